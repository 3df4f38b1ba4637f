"""Ends a script of an older Python with one line. Scripts import it first, since an older Python
cannot import what comes after it. This file, and the scripts themselves (no `:=`, no `match`), have
to be readable for Python 3.6.

While a script still imports, Ctrl-C ends it at once, without the traceback of some import;
`cli.exit_statuses` takes over.
"""

import os
import signal
import sys

OLDEST = (3, 10)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

if sys.version_info < OLDEST:
    script = os.path.basename(sys.argv[0])
    message = (
        "%s: error: this is Python %d.%d, and %d.%d or newer is needed: start the script with one\n"
    )
    sys.stderr.write(message % ((script,) + sys.version_info[:2] + OLDEST))
    sys.exit(2)

runs = getattr(sys.modules["__main__"], "__file__", None) or ""
if (
    os.path.dirname(os.path.abspath(runs)) == ROOT  # no other program imports a script
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
