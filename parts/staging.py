"""A folder that is written whole or not at all."""

import fcntl
import fnmatch
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from parts.cli import script_name


def matching(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Return the names in a folder that match one of the patterns, in the patterns' order."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    found = [name for pattern in patterns for name in fnmatch.filter(names, pattern)]
    return list(dict.fromkeys(found))


def check_folder(folder: Path, flag: str) -> None:
    """Raise NotADirectoryError where this cannot be a folder. flag: that names it."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{flag} {folder}: {path} is a file, not a folder")


@contextmanager
def staged_folder(target: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """Yield a folder to write a model into, which becomes `target` when all is written.

    patterns: of the names of its files, in the order in which these are moved.
    Into a folder that exists, the files are moved one by one: it may be a disk of its own, and may
    hold other files. Those that an earlier model had and this one has not are removed. The last is
    away meanwhile, so that no two models can be taken for one.
    Raises ValueError where another run writes there, or where something is in the way.
    """
    exists = target.exists()
    staged = (target / "unfinished") if exists else target.with_name(f"{target.name}.unfinished")
    is_other = staged.is_symlink() or (staged.exists() and not staged.is_dir())
    if is_other or (staged.exists() and set(os.listdir(staged)) - set(matching(staged, patterns))):
        raise ValueError(f"{staged} is in the way, where the model is first written: move it")
    lock = None
    try:
        staged.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(staged)
        for name in os.listdir(staged):  # what a run that was killed has left
            (staged / name).unlink()
        yield staged
        if exists:
            written = matching(staged, patterns)
            (target / patterns[-1]).unlink(missing_ok=True)
            for name in set(matching(target, patterns)) - set(written):
                (target / name).unlink()
            for name in written:
                os.replace(staged / name, target / name)
            staged.rmdir()
        else:
            staged.rename(target)
    except BaseException as error:
        if lock is not None:
            shutil.rmtree(staged, ignore_errors=True)
        elif not isinstance(error, ValueError):  # a signal, before the folder was locked
            with suppress(OSError):
                staged.rmdir()
        raise
    finally:
        if lock is not None:
            os.close(lock)


def lock_folder(folder: Path) -> int:
    """Lock a folder for this process, and return what to close when it is done with it.

    Raises ValueError where another one has it.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ValueError(f"another {script_name()} writes into {folder}: wait for it") from error
    return lock
