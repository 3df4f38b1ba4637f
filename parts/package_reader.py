"""Read the docstrings of a package in processes of their own, since importing it runs its code.

1. `read_packages` reads some packages at a time, each by `read_package`.
2. `read_package` starts a process for the package, and hands its records on.
3. The process, `send_records`, sends what it imports and looks at, what it skips, and the records.
4. Where the process ends or hangs, what it was at is left out, and another process reads the rest.

A spawned process imports the script again: what this file and the script import is light.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import Event
from typing import NamedTuple

from parts.foreign import TookTooLong, describe
from parts.package_modules import import_modules
from parts.public_objects import documented_objects


class Record(NamedTuple):
    """A documented object: its package, its name there, its dotted name, and its docstring."""

    package: str
    name: str
    dotted_name: str
    docstring: str


class Settings(NamedTuple):
    """How to read a package."""

    clean: Callable[[str], str]  # makes a docstring fit to learn from, or empty, which drops it
    batch_size: int  # records that a process sends at once
    module_seconds: float  # that the import of a module may take
    package_seconds: float  # that the imports may take; to look at them, as much again
    grace_seconds: float  # after which a process that does not interrupt itself is killed


# -------------------------------------------------------------------------------------------------
# In the script's process


def read_packages(
    packages: list[str],
    take: Callable[[list[Record]], None],
    n_processes: int,
    settings: Settings,
) -> dict[str, str]:
    """Hand the records of all packages to `take`, which is called in several threads. Return the
    modules and objects that were skipped, and why. Show a bar of the packages that are done.
    """
    from tqdm import tqdm  # here: not for the processes that read

    skipped, stopped = {}, Event()
    with ThreadPoolExecutor(n_processes) as pool:
        readings = pool.map(lambda name: read_package(name, take, stopped, settings), packages)
        try:
            for found in tqdm(readings, "Reading", len(packages), unit=" packages", disable=None):
                skipped |= found
        except BaseException:  # Ctrl-C, or a full disk
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second would leave processes
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                kill(process)
            signal.signal(signal.SIGINT, before)
            raise
    return skipped


def read_package(
    package: str, take: Callable[[list[Record]], None], stopped: Event, settings: Settings
) -> dict[str, str]:
    """Hand the records of a package to `take`. Return what was skipped, and why.

    A module or an object that ends its process, or hangs where nothing interrupts it, is left out
    in the next process. When `stopped` is set there is no next one.
    """
    skipped, deadline = {}, time.monotonic() + settings.package_seconds
    slow = f"it took longer than {settings.module_seconds} s"
    late = f"the package took longer than {settings.package_seconds} s"
    while True:
        # Start a process that leaves out what was skipped.
        current, has_records = package, False
        seconds = deadline - time.monotonic()
        with start_process(package, set(skipped), seconds, settings) as (connection, how_it_ended):
            try:
                while True:
                    # Wait for its next message, as long as one module or object may take.
                    left = deadline + settings.package_seconds - time.monotonic()
                    patience = min(left, settings.module_seconds + settings.grace_seconds)
                    if not connection.poll(max(0, patience)):
                        reason = late if left < settings.module_seconds else slow
                        break

                    # Note what it is at, what it skips, and its records.
                    kind, *content = receive(connection)
                    if kind in ("import", "look"):
                        current = content[0]
                    elif kind == "skip":
                        skipped[content[0]] = content[1]
                    elif kind in ("slow", "late"):
                        skipped[content[0]] = slow if kind == "slow" else late
                    elif kind == "records":
                        has_records = True
                        take([Record(*fields) for fields in content[0]])
                    else:
                        return skipped
            except EOFError:
                reason = how_it_ended()

        # Skip what it was at, and read the others again where that can work.
        skipped[current] = reason
        too_late = time.monotonic() > deadline or stopped.is_set()
        if current == package or has_records or too_late:
            return skipped


def receive(connection: Connection) -> tuple:
    """Return the next message. Raises EOFError where the process has ended, also amid one."""
    try:
        return connection.recv()
    except OSError as error:
        raise EOFError from error


@contextmanager
def start_process(
    package: str, skipped: set[str], seconds: float, settings: Settings
) -> Iterator[tuple[Connection, Callable[[], str]]]:
    """Start a process that reads a package. Yield the connection on which it sends, and a function
    that says how it ended; kill it at the end.
    """
    os.environ["PYTHONHASHSEED"] = "0"  # some docstrings print sets, which then have one order
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe(duplex=False)
    arguments = package, skipped, seconds, settings, theirs
    process = context.Process(target=send_records, args=arguments)
    process.start()
    theirs.close()

    def how_it_ended() -> str:
        process.join(5)
        code = process.exitcode
        if code is None:
            return "it closed its connection"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"it exited with {code}"

    try:
        yield connection, how_it_ended
    finally:
        kill(process)


def kill(process: BaseProcess) -> None:
    """Kill a process with all that it has started, also where it has ended by itself."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # its group has its number
    process.kill()
    process.join()


# -------------------------------------------------------------------------------------------------
# In the process that reads


def send_records(
    package: str, skipped: set[str], seconds: float, settings: Settings, connection: Connection
) -> None:
    """Send what is imported and looked at, what is skipped, and the records in batches.

    seconds: that are left for the imports of the package.
    """
    own_pid = os.getpid()

    def tell(*message: object) -> None:
        if os.getpid() != own_pid:
            os._exit(0)  # a module has forked: one of the two continues
        connection.send(message)

    stand_alone()
    deadline = time.monotonic() + seconds
    try:
        modules = import_modules(package, skipped, tell, settings.module_seconds, deadline)
        found = documented_objects(package, modules, skipped, tell)
        cleaned = [(name, path, settings.clean(docstring)) for name, path, docstring in found]
        records = iter([(package, *record) for record in cleaned if record[-1]])
        for batch in iter(lambda: list(islice(records, settings.batch_size)), []):
            tell("records", batch)
    except TookTooLong:
        tell("slow", package)
    except BaseException as error:  # whatever a foreign package may raise
        tell("skip", package, describe(error))
    tell("end")
    connection.close()
    os._exit(0)  # whatever threads the package has started


def stand_alone() -> None:
    """Keep the user from what a package prints, asks for or shows, and it from the suite's."""
    os.setsid()  # so that it can be killed with all processes that it starts
    with open(os.devnull, "r+") as nothing:
        for stream in (0, 1, 2):
            os.dup2(nothing.fileno(), stream)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        os.environ.pop(name, None)
    os.environ |= {"MPLBACKEND": "Agg", "QT_QPA_PLATFORM": "offscreen", "SDL_VIDEODRIVER": "dummy"}
    sys.argv = [""]
    # The suite's modules must not stand in the place of the package's own, as `models`.
    suite = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path = [path for path in sys.path if os.path.abspath(path) != suite] + [suite]
    for name in [name for name in sys.modules if name.partition(".")[0] == "parts"]:
        del sys.modules[name]
