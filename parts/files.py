"""Files: written whole or not at all, what they hold whatever their names say, JSON, text."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# What downloads leave in a file's place, by how it begins, and what to do about it.
STAND_INS = {
    rb"version https://git-lfs": "a git-lfs pointer, not the file itself: run git lfs pull there",
    rb"\s*<(!doctype|html|head|\?xml)": "a web page, not the file itself: download it again",
    rb"(Entry not found|Invalid username|Access to model )": "a server's error message, not the "
    "file itself: download it again, logged in",
}


def check_content(path: str | Path) -> None:
    """Raise ValueError where a file is only what a download has left in its place."""
    with open(path, "rb") as file:
        head = file.read(256).removeprefix(b"\xef\xbb\xbf")
    for beginning, what in STAND_INS.items():
        if re.match(beginning, head, re.IGNORECASE):
            raise ValueError(f"{path} is {what}")


def is_safetensors(path: str | Path) -> bool:
    """Whether a file begins as .safetensors files do: the size of a JSON object, and the object."""
    with open(path, "rb") as file:
        head = file.read(9)
    size = int.from_bytes(head[:8], "little")
    return head[8:] == b"{" and size <= Path(path).stat().st_size - 8


def decode_text(content: bytes, source: str) -> str:
    """The text of a file, without what only editors put there: a byte order mark, carriage returns
    and the end of the last line. Raises ValueError, which names `source`.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not valid UTF-8: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def find_file(path: Path) -> Path:
    """Return the path of a file that exists. Raises FileNotFoundError where it does not, ValueError
    where something else lies there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it is part of the checkpoint, download it")
    check_content(path)
    return path


def read_json(path: Path) -> dict:
    """Read the object in a JSON file. Raises FileNotFoundError or ValueError."""
    try:
        content = json.loads(find_file(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold an object")
    return content


def digest(content: bytes) -> str:
    """Return the SHA-256 of the content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def partial_file(path: str | Path) -> Path:
    """Return where a file is first written: next to it, or next to what a link leads to."""
    return Path(f"{Path(path).resolve()}.partial")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file to write, and rename it to `path` once it is whole and on the disk.

    If writing fails, `path` stays as it was and the partial file is removed. If only the rename
    fails, or a kill comes before it, the partial file stays, whole. Raises OSError.
    """
    partial = partial_file(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except Exception:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, partial.with_suffix(""))
