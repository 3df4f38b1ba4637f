"""The token ids of a large data file, next to it, so that the next start need not make them again.

data/train.jsonl.tokens is written whole or not at all: HEAD, arrays, a JSON object that describes
them, and TAIL, which is the object's length and a checksum of all before it. It counts as long as
the data file has the size and the time of change that it had. What else its tokens depend on is
their key, which `token_rows` makes. What is damaged, or cannot be read, counts as missing.

A process that writes it holds a lock on the partial file, which the system releases when the
process ends. Another that comes meanwhile writes none. What a process has read stays as it is,
since a new file only takes the other's name.
"""

import fcntl
import json
import os
import shutil
import struct
import tempfile
import time
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from parts.cli import warn
from parts.files import digest

LARGE = 1 << 24  # bytes of a data file whose tokens are kept
IN_MEMORY = 1 << 24  # tokens, of 4 bytes; more are in a file at once
HEAD = b"lora.py's token ids, made again where they are missing".ljust(64)
TAIL = struct.Struct("<QI")
ALIGNED = 64  # bytes, a multiple of which each array begins at
BLOCK = 1 << 24  # bytes, of which a checksum is computed at once
BAR_DELAY = 2  # seconds until a bar shows
SETTLED = 2  # seconds, of which some file systems' times are multiples
DECIDES = (
    *("records", "token_cache", "token_rows", "chat", "chat_renderer"),
    *("tokenizers", "added_tokens"),
)


class Saved(NamedTuple):
    """What lies next to a data file: arrays, in the file itself, and what describes them."""

    about: dict
    arrays: dict[str, np.ndarray]


def cache_file(data: str | Path) -> Path:
    """Return where the tokens of a data file are kept."""
    return Path(f"{data}.tokens")


def stamp(data: int, key: str) -> list:
    """Return what tells whether an open file is still the one that was read: its size and time of
    change, the key of its texts, and the code that reads it. Raises OSError.
    """
    code = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in DECIDES]
    status = os.stat(data)
    return [status.st_size, status.st_mtime_ns, key, digest(b"".join(code))]


def is_large(as_read: list) -> bool:
    """Whether the tokens of a file with this `stamp` are kept."""
    return as_read[0] >= LARGE


def read_cache(data: str | Path, as_read: list) -> Saved | None:
    """Return what is kept of a data file; None where nothing is, or of another `stamp`."""
    path = cache_file(data)
    try:
        if not path.is_file():
            return None
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END) - TAIL.size
            file.seek(max(end, 0))
            length, checksum = TAIL.unpack(file.read())
            if not is_ours(path) or length > end:
                return None
            content = np.asarray(np.memmap(file, np.uint8, mode="r"))  # whose slices cost less
        about = json.loads(bytes(content[end - length : end]))
        if about["data"] != as_read or crc32(content[:end], path) != checksum:
            return None
        arrays = {
            name: content[start : start + n * np.dtype(dtype).itemsize].view(dtype)
            for name, dtype, n, start in about["arrays"]
        }
    except (OSError, ValueError, TypeError, KeyError, RecursionError, struct.error):
        return None
    return Saved(about, arrays)


def crc32(content: np.ndarray, path: Path) -> int:
    """Return the checksum of the bytes of a file."""
    checksum = 0
    bar = {"unit": "B", "unit_scale": True, "leave": False, "delay": BAR_DELAY}
    with tqdm(None, f"Reading {path}", len(content), disable=None, **bar) as progress:
        for start in range(0, len(content), BLOCK):
            block = content[start : start + BLOCK]
            checksum = zlib.crc32(block, checksum)
            progress.update(len(block))
    return checksum


class TokenWriter:
    """Gathers rows of token ids: in memory, where they are few, else in the file that is to be
    kept, or in a temporary one.

    data: the file whose rows they are; where it is large, they are kept next to it. as_read: its
    `stamp` before it was read.
    """

    def __init__(self, data: str | Path, as_read: list):
        self._data, self._as_read = data, as_read
        self._waiting: list[np.ndarray] = []
        self._n_waiting = self._size = self._checksum = 0
        self._file: BinaryIO | None = None
        self._is_kept = is_large(as_read)

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind and self._file and self._is_kept:
            partial_file(cache_file(self._data)).unlink(missing_ok=True)

    def add(self, row: np.ndarray) -> None:
        """Add a row, int32. Raises OSError where no disk holds it."""
        self._waiting.append(row)
        self._n_waiting += len(row)
        if self._n_waiting >= IN_MEMORY:
            self._spill()

    def finish(self, about: dict, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Return the token ids of all rows, and keep them with `arrays` and what `about` says.
        Raises OSError.
        """
        if not self._file and not self._is_kept:
            return self._take_waiting()
        self._spill()
        n_tokens = (self._size - len(HEAD)) // 4
        if self._is_kept:
            try:
                self._keep(about, arrays)
            except OSError as error:
                self._give_up(error)
        return np.asarray(np.memmap(self._file, np.int32, "r", len(HEAD), n_tokens))

    def _take_waiting(self) -> np.ndarray:
        tokens = np.concatenate([np.zeros(0, np.int32), *self._waiting])
        self._waiting, self._n_waiting = [], 0
        return tokens

    def _spill(self) -> None:
        """Write what waits."""
        tokens = self._take_waiting()
        try:
            if not self._file:
                self._file = open_partial(cache_file(self._data)) if self._is_kept else None
                self._is_kept = self._file is not None
                self._file = self._file or tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
                self._write(np.frombuffer(HEAD, np.uint8))
            self._write(tokens)
        except OSError as error:
            if not self._is_kept:
                raise
            self._give_up(error)
            self._write(tokens)

    def _write(self, array: np.ndarray) -> None:
        """Write an array, which counts once it is written whole."""
        self._file.seek(self._size)
        content = array.view(np.uint8)
        while len(content):
            content = content[self._file.write(content) :]
        self._size += array.nbytes
        self._checksum = zlib.crc32(array, self._checksum)

    def _keep(self, about: dict, arrays: dict[str, np.ndarray]) -> None:
        """Write what follows the tokens, and give the file its name."""
        described = [["tokens", "<i4", (self._size - len(HEAD)) // 4, len(HEAD)]]
        for name, array in arrays.items():
            self._write(np.zeros(-self._size % ALIGNED, np.uint8))
            described.append([name, array.dtype.str, len(array), self._size])
            self._write(array)
        about = {**about, "data": self._as_read, "arrays": described}
        content = np.frombuffer(json.dumps(about).encode(), np.uint8)
        self._write(content)
        self._write(np.frombuffer(TAIL.pack(len(content), self._checksum), np.uint8))
        os.fsync(self._file.fileno())
        path = cache_file(self._data)
        if is_settled(self._data, self._as_read) and is_ours(path):
            os.replace(partial_file(path), path)
        else:
            partial_file(path).unlink()

    def _give_up(self, error: OSError) -> None:
        """Go on in a temporary file."""
        path = cache_file(self._data)
        warn(f"{path} cannot be written, so that each start tokenizes again: {error}")
        kept, self._is_kept = self._file, False
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        if kept is not None:
            partial_file(path).unlink(missing_ok=True)
            kept.seek(0)
            shutil.copyfileobj(kept, self._file, BLOCK)
            kept.close()
        if not self._size:  # not even that was written
            self._write(np.frombuffer(HEAD, np.uint8))


def partial_file(path: Path) -> Path:
    """Return where a cache is first written."""
    return Path(f"{path}.partial")


def open_partial(path: Path) -> BinaryIO | None:
    """Open the file to write, empty; None where another process writes it. Raises OSError."""
    partial = partial_file(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.fdopen(os.open(partial, flags, 0o666), "r+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_ino == os.stat(partial).st_ino:
            file.truncate(0)
            return file
    except (BlockingIOError, FileNotFoundError):
        pass  # it is being written, or has just become what the other process keeps
    file.close()
    return None


def is_ours(path: Path) -> bool:
    """Whether a cache may take this file's place: there is none, or one, whole or not."""
    if not path.is_file():
        return not path.exists()
    with open(path, "rb") as file:
        return file.read(len(HEAD)) in (HEAD, b"", bytes(len(HEAD)))


def is_settled(data: str | Path, as_read: list) -> bool:
    """Whether a data file is the one that was read, and will not look like it after a change: the
    tick of the clock, in which it was changed, has passed.
    """
    status = os.stat(data)
    is_old = time.time() - status.st_mtime > SETTLED
    return is_old and [status.st_size, status.st_mtime_ns] == as_read[:2]
