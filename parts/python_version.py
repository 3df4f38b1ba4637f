"""Ends a script of an older Python with one line. Scripts import it first, since an older Python
cannot import what comes after it. This file, and the scripts themselves (no `:=`, no `match`), have
to be readable for Python 3.6.
"""

import os
import sys

OLDEST = (3, 10)

if sys.version_info < OLDEST:
    script = os.path.basename(sys.argv[0])
    message = (
        "%s: error: this is Python %d.%d, and %d.%d or newer is needed: start the script with one\n"
    )
    sys.stderr.write(message % ((script,) + sys.version_info[:2] + OLDEST))
    sys.exit(2)
