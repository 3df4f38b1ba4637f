"""The command line of each script: its parser, one line for an error, exit statuses, signals.

A script's `main` is `cli.run(build_parser(), run)`. Exit statuses:

  0  done
  1  the machine failed: no disk space, no memory, an error of a library or of the device
  2  the user's mistake, which the line explains: a missing or malformed file, a flag that cannot be
130  Ctrl-C; 128 + the signal's number for others, so 143 for SIGTERM
"""

import argparse
import difflib
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

MACHINE_FAILED, USER_ERROR, CTRL_C = 1, 2, 130
USER_ERRORS = (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
MACHINE_ERRORS = (OSError, MemoryError, RuntimeError, FloatingPointError)


def script_name() -> str:
    """The name of the script that runs, such as `lora.py`."""
    return os.path.basename(sys.argv[0])


# -------------------------------------------------------------------------------------------------
# Parsing


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keep the lines of the description, and show the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = "(default" in action.help  # by the flag itself, in its own words
        no_default = action.default in (None, argparse.SUPPRESS) or action.default is False
        return action.help if shown or no_default else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage before it.

    doc: the script's docstring; its first paragraph begins the help, the others end it.
    """

    def __init__(self, doc: str):
        description, _, epilog = doc.partition("\n\n")
        super().__init__(
            prog=script_name(),
            description=description,
            epilog=epilog,
            formatter_class=HelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with status 2."""
        leave(USER_ERROR, f"error: {one_line(message)}; see {self.prog} --help")


def number(
    kind: type[int] | type[float], accept: Callable[[float], bool], expected: str
) -> Callable[[str], float]:
    """Return a `type` for a flag: a finite number of `kind` that `accept` accepts. Of any other,
    the error says that it is not `expected`.
    """

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and accept(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return parse


def did_you_mean(path: str | Path) -> str:
    """Return " (did you mean PATH?)" for a path that does not exist and resembles one that does,
    else nothing.
    """
    path = Path(path)
    while not path.parent.is_dir():
        path = path.parent
    close = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    return f" (did you mean {path.parent / close[0]}?)" if close and not path.exists() else ""


# -------------------------------------------------------------------------------------------------
# Messages, on standard error


def one_line(message: object) -> str:
    """The message with each run of white space as one space."""
    return " ".join(str(message).split())


def warn(message: str) -> None:
    """Print a warning. A progress bar stays whole."""
    from tqdm import tqdm  # here: most runs and all readers of the data set script do without

    tqdm.write(f"{script_name()}: warning: {message}", file=sys.stderr)


def fail(error: BaseException, status: int, advice: str | None = None) -> NoReturn:
    """Print what went wrong, and what helps if `advice` says so; exit with the status."""
    message = one_line(error) or type(error).__name__
    leave(status, f"error: {message}{f'; {advice}' if advice else ''}")


def leave(status: int, message: str) -> NoReturn:
    """Print the message after the script's name, and exit with the status."""
    print(f"{script_name()}: {message}", file=sys.stderr)
    sys.exit(status)


# -------------------------------------------------------------------------------------------------
# Running


def run(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None]) -> None:
    """Parse the command line and call `work` with it. Errors, Ctrl-C, SIGTERM and SIGHUP end the
    process with their exit status, after the clean-up of `with` and `finally`.
    """
    open_closed_streams()
    args = parser.parse_args()
    exit_at_signals()
    with exit_statuses():
        work(args)
    ignore_signals()


def open_closed_streams() -> None:
    """Open the standard streams that the caller has closed, so that printing does not fail. Have a
    terminal without Unicode show question marks.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  open to the end
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="replace")


def exit_at_signals() -> None:
    """Have SIGTERM and SIGHUP raise SystemExit, so that what is half-done is cleaned up. A signal
    that is ignored stays so, as `nohup` has it.
    """
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, lambda number, _: sys.exit(128 + number))


def ignore_signals() -> None:
    """Ignore signals from now on: all is done, also where Python takes a while to end."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)


@contextmanager
def exit_statuses(
    advice: Callable[[BaseException], str | None] = lambda error: None,
) -> Iterator[None]:
    """End the process with one line and its exit status where the block raises an error.

    advice: returns what helps against an error, or None. Other errors are the suite's own: they
    pass, with their traceback.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as python_version has it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(CTRL_C)
    except BrokenPipeError:  # whoever read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(MACHINE_FAILED)
    except USER_ERRORS as error:
        fail(error, USER_ERROR, advice(error))
    except ModuleNotFoundError as error:  # of a package that only some models need
        fail(error, MACHINE_FAILED, "pip install -r requirements.txt")
    except MACHINE_ERRORS as error:
        fail(error, MACHINE_FAILED, advice(error))
