"""Make a data set for lora.py out of the docstrings of installed packages.

python cwk_create_dataset.py
python cwk_create_dataset.py numpy networkx --data-folder my-data

Writes train.jsonl, valid.jsonl and test.jsonl with one record a public object, such as
{"text": "Q: What is ReLU in mlx?\\nA: mlx.nn.ReLU Applies the Rectified Linear Unit. ..."}
"""

import argparse
import importlib
import inspect
import json
import os
import pkgutil
import random
import re
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

from tqdm import tqdm

SEQ_LIMIT = 2048  # characters of a docstring at most
TEST_SET_SIZE = 0.1  # share of the records that are the test set; the validation set is as large
PACKAGE_NAMES = ["mlx"]  # whose docstrings to take
DATA_FOLDER = "mlx-doc-data"  # where to write the files
DATASET = {"train.jsonl": None, "valid.jsonl": None, "test.jsonl": None}  # texts of each file
BATCH_SIZE = 1000  # docstrings that go through the process pool at once
PREPROCESS = True  # make docstrings fit to learn from, or leave them as they are

NOT_IMPORTED = {"__main__", "conftest", "test", "tests"}  # modules that are no part of the library


class Record(NamedTuple):
    """A documented object: its package, its name there, its dotted name, and its docstring."""

    package: str
    name: str
    dotted_name: str
    docstring: str

    def text(self) -> str:
        return f"Q: What is {self.name} in {self.package}?\nA: {self.dotted_name} {self.docstring}"


# -------------------------------------------------------------------------------------------------
# Finding objects


def import_modules(package: ModuleType) -> list[str]:
    """Import every public module below `package`; gives a line for each that cannot be."""
    skipped, queue = [], deque([package])
    while queue:
        parent = queue.popleft()
        for found in pkgutil.iter_modules(getattr(parent, "__path__", [])):
            if found.name.startswith("_") or found.name in NOT_IMPORTED:
                continue
            name = f"{parent.__name__}.{found.name}"
            try:
                queue.append(importlib.import_module(name))
            except (Exception, SystemExit) as error:  # whatever a foreign module may raise
                skipped.append(f"{name}, {type(error).__name__}: {str(error)[:100]}")
    return skipped


def public_members(owner: object) -> Iterator[tuple[str, object]]:
    """Names and values that a module or class holds itself, nothing private or inherited."""
    for name, value in sorted(vars(owner).items()):
        if not name.startswith("_"):
            yield name, getattr(value, "__func__", value)  # what a classmethod wraps


def belongs_to(value: object, package: str) -> bool:
    """Whether a value is a part of the package, and not imported into it from elsewhere."""
    if inspect.ismodule(value):
        home = value.__name__
    elif isinstance(value, property):
        return True
    else:
        home = getattr(value, "__module__", None)
        if not isinstance(home, str):  # as for the methods of compiled classes
            home = getattr(getattr(value, "__objclass__", None), "__module__", package)
    return home == package or home.startswith(f"{package}.")


def own_docstring(value: object) -> str | None:
    """The docstring of a module, class, function or property, unless it is its type's."""
    documented = inspect.ismodule(value) or callable(value) or isinstance(value, property)
    own = value.__dict__ if inspect.isclass(value) else {"__doc__": getattr(value, "__doc__", None)}
    docstring = own.get("__doc__")
    if not documented or not isinstance(docstring, str) or docstring == type(value).__doc__:
        return None
    return inspect.cleandoc(docstring).strip() or None


def find_objects(package: ModuleType) -> Iterator[tuple[str, str, object]]:
    """Every public object of a package once, as (name, dotted name, object).

    Level by level, so that an object's path is the shortest public one; of several, the one where
    it was defined, else the alphabetically first. A member of a class is named with it.
    """
    seen = {id(package)}
    level = [("", package.__name__, package)]
    while level:
        found = [
            (f"{prefix}{name}", f"{path}.{name}", value)
            for prefix, path, owner in level
            for name, value in public_members(owner)
            if belongs_to(value, package.__name__)
        ]
        found.sort(key=lambda entry: (entry[1] != home(entry[2]), entry[1]))
        level = []
        for name, path, value in found:
            if id(value) in seen:
                continue
            seen.add(id(value))
            yield name, path, value
            if inspect.ismodule(value):
                level.append(("", path, value))
            elif inspect.isclass(value):
                level.append((f"{name}.", path, value))


def home(value: object) -> str:
    """The dotted name under which an object was defined, as far as it knows."""
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"


def read_package(package: str) -> tuple[list[Record], list[str]]:
    """The records of a package, and a line for each of its modules that cannot be imported.

    Runs in a process of its own, since importing runs the package's code.
    """
    try:
        module = importlib.import_module(package)
    except (Exception, SystemExit) as error:  # whatever a foreign package may raise
        return [], [f"{package}, {type(error).__name__}: {str(error)[:100]}"]
    skipped = import_modules(module)
    records = []
    for name, dotted_name, value in find_objects(module):
        docstring = own_docstring(value)
        if docstring:
            records.append(Record(package, name, dotted_name, docstring))
    return records, skipped


# -------------------------------------------------------------------------------------------------
# Cleaning


ROLE = re.compile(r":[\w:+.-]+:`([^`]*)`")
DIRECTIVE = re.compile(r"^( *)\.\. [\w:-]+::[ \t]*(.*)$", re.MULTILINE)


def clean(docstring: str) -> str:
    """Make a docstring plain text, and no longer than SEQ_LIMIT.

    reStructuredText roles and directives become the text that a reader sees; the summary is a
    paragraph of its own; trailing space and runs of blank lines go.
    """
    if PREPROCESS:
        text = ROLE.sub(lambda match: visible(match[1]), docstring)
        text = DIRECTIVE.sub(r"\1\2", text)
        text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
        text = re.sub(r"\A([^\n]*\.)\n[ \t]+(?=\S)", r"\1\n\n", text)
        docstring = re.sub(r"\n{3,}", "\n\n", text).strip()
    return cut(docstring, SEQ_LIMIT)


def visible(target: str) -> str:
    """What Sphinx shows of a role's content: the title of `title <target>`, the end of `~a.b`."""
    title = re.fullmatch(r"(.*?)\s*<[^>]*>", target, re.DOTALL)
    if title:
        return title[1]
    return target.rsplit(".", 1)[-1] if target.startswith("~") else target.lstrip("!")


def cut(text: str, limit: int) -> str:
    """The text, or as many whole paragraphs, else lines, else words of it as `limit` takes."""
    if len(text) <= limit:
        return text
    head = text[: limit + 1]
    for end in ("\n\n", "\n", " "):
        if end in head:
            return head[: head.rindex(end)].rstrip()
    return text[:limit]


# -------------------------------------------------------------------------------------------------
# Splitting and writing


def split(records: list[Record]) -> dict[str, list[str]]:
    """Share the texts out to the files of DATASET; the same records give the same files.

    Records with one docstring stay together, so that none is both trained on and tested.
    """
    groups = {}
    for record in sorted(records):
        groups.setdefault(record.docstring, []).append(record.text())
    shuffled = list(groups.values())
    random.Random(0).shuffle(shuffled)

    held_out = max(1, round(TEST_SET_SIZE * len(records)))
    files = {name: [] for name in DATASET}
    for texts in shuffled:
        name = next((n for n in ("test.jsonl", "valid.jsonl") if len(files[n]) < held_out), None)
        files[name or "train.jsonl"] += texts
    return files


def write_files(files: dict[str, list[str]], folder: Path) -> None:
    """Write each file beside its place, and move all there when all are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = {name: folder / f"{name}.partial" for name in files}
    try:
        for name, texts in files.items():
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            beside[name].write_text(lines, encoding="utf-8")
        for name in files:
            os.replace(beside[name], folder / name)
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------
# The run


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def silence() -> None:
    """Keep what a package prints or asks for while it is imported away from the terminal."""
    with open(os.devnull, "r+") as nothing:
        for stream in (0, 1, 2):
            os.dup2(nothing.fileno(), stream)


def create_dataset(packages: list[str], folder: Path) -> None:
    """Read the packages, clean and split their docstrings, and write the files.

    Raises ValueError when there is nothing to write.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--data-folder {folder} is a file: name a folder")
    records, skipped = [], []
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=silence) as pool:
        readings = {package: pool.submit(read_package, package) for package in packages}
        for package, reading in tqdm(readings.items(), "Reading", disable=None):
            try:
                found, unread = reading.result()
            except BrokenProcessPool:
                raise ValueError(f"reading {package} ended its process: leave it out") from None
            records += found
            skipped += unread
        for start in tqdm(range(0, len(records), BATCH_SIZE), "Cleaning", disable=None):
            batch = records[start : start + BATCH_SIZE]
            cleaned = pool.map(clean, [record.docstring for record in batch], chunksize=100)
            records[start : start + BATCH_SIZE] = [
                record._replace(docstring=text) for record, text in zip(batch, cleaned, strict=True)
            ]
    if len(records) < 3:
        reason = f" (not read: {'; '.join(skipped)})" if skipped else ""
        raise ValueError(
            f"{', '.join(packages)} gave {len(records)} docstrings, too few for three files: "
            f"name installed packages{reason}"
        )

    files = split(records)
    write_files(files, folder)
    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)
    for name, texts in files.items():
        print(f"{folder / name}: {len(texts)} records, the longest {max(map(len, texts))} chars")


def fail(error: BaseException, status: int) -> NoReturn:
    """Say on one line what went wrong, and exit."""
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"cwk_create_dataset.py: error: {message}", file=sys.stderr)
    sys.exit(status)


def main() -> None:
    description, _, examples = __doc__.partition("\n\n")
    parser = OneLineParser(
        prog="cwk_create_dataset.py",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "packages",
        nargs="*",
        metavar="PACKAGE",
        default=PACKAGE_NAMES,
        help=f"packages to read (default: {' '.join(PACKAGE_NAMES)})",
    )
    parser.add_argument(
        "--data-folder", default=DATA_FOLDER, help="folder to write (default: %(default)s)"
    )
    args = parser.parse_args()
    try:
        create_dataset(args.packages, Path(args.data_folder))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, NotADirectoryError) as error:
        fail(error, 2)  # the user can mend it
    except (OSError, MemoryError, RuntimeError) as error:
        fail(error, 1)  # the machine failed


if __name__ == "__main__":
    main()
