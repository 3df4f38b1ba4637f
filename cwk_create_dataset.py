"""Make a data set for lora.py out of the docstrings of installed packages.

python cwk_create_dataset.py
python cwk_create_dataset.py numpy networkx --data-folder my-data --format chat

Writes train.jsonl, valid.jsonl and test.jsonl with one record a public object, such as
{"text": "Q: What is ReLU in mlx?\\nA: mlx.nn.ReLU Applies the Rectified Linear Unit. ..."}
or, by --format, a prompt and its completion, or a chat.
"""

from parts import python_version  # noqa: F401  before what an older Python lacks

import argparse
import json
import os
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Lock
from typing import BinaryIO, NamedTuple

# Light ones: each process that reads a package imports them again.
from parts import cli, docstrings
from parts.files import check_content
from parts.package_modules import names_of_distribution
from parts.package_reader import Record, Settings, read_packages

SEQ_LIMIT = 2048  # characters of a docstring at most
TEST_SET_SIZE = 0.1  # share of the records that are the test set; the validation set is as large
PACKAGE_NAMES = ["mlx"]  # whose docstrings to take
DATA_FOLDER = "mlx-doc-data"  # where to write the files
DATASET = {"train.jsonl": None, "valid.jsonl": None, "test.jsonl": None}  # the files' names
BATCH_SIZE = 1000  # docstrings that a process hands over at once
PREPROCESS = True  # make docstrings fit to learn from, or leave them as they are

MODULE_SECONDS = 120  # that the import of a module may take
PACKAGE_SECONDS = 1800  # that the imports of a package may take; to look at them, as much again
GRACE_SECONDS = 30  # after which a process that does not interrupt itself is killed
LONGEST_LINE = 1 << 20  # bytes of a line that this script may have written
QUESTION = "Q: What is {name} in {package}?\nA: "
FORMATS = ("text", "completion", "chat")  # of a record

# -------------------------------------------------------------------------------------------------
# Splitting and writing


class Line(NamedTuple):
    """A record in the spool: all but its docstring, and where that is, in bytes."""

    package: str
    dotted_name: str
    name: str
    start: int
    size: int


class Spool:
    """The docstrings of the records in a temporary file, so that memory holds none of them."""

    def __init__(self, file: BinaryIO):
        self.file, self.lines, self._lock = file, [], Lock()

    def append(self, records: list[Record]) -> None:
        """Write the records' docstrings to the end of the file. Threads may call this at once."""
        with self._lock:
            for package, name, dotted_name, docstring in records:
                content = docstring.encode()
                self.lines.append(Line(package, dotted_name, name, self.file.tell(), len(content)))
                self.file.write(content)

    def read(self, line: Line) -> str:
        """Read the docstring of a line."""
        self.file.seek(line.start)
        return self.file.read(line.size).decode()


def make_unique(lines: list[Line]) -> list[Line]:
    """Return the lines with names that are one object's each: where objects of a package share a
    name, with as many parts more of the dotted name as tell them apart.
    """
    while True:
        counts = Counter((line.package, line.name) for line in lines)
        longer = [
            line._replace(name=longer_name(line)) if counts[line.package, line.name] > 1 else line
            for line in lines
        ]
        if longer == lines:
            return lines
        lines = longer


def longer_name(line: Line) -> str:
    """Return the line's name with one more part of the dotted name, if there is one."""
    parts = line.dotted_name.split(".")
    return ".".join(parts[-line.name.count(".") - 2 :])


def split(lines: list[Line], groups: list[int]) -> dict[str, list[Line]]:
    """Split the records into the files of DATASET, the same records at every run alike.

    groups: a number for each line. Lines of one number stay together, so that no text is both
    trained on and tested; those that are a large part of a file are for training. Where groups are
    few, a file may stay empty.
    """
    members: dict[int, list[Line]] = {}
    for line, group in zip(lines, groups, strict=True):
        members.setdefault(group, []).append(line)
    shuffled = list(members.values())
    random.Random(0).shuffle(shuffled)

    held_out = max(1, round(TEST_SET_SIZE * len(lines)))
    largest = max(held_out // 5, min(map(len, shuffled), default=0))
    files = {name: [] for name in DATASET}
    for group in shuffled:
        room = held_out if len(group) <= largest else 0
        fits = (n for n in ("test.jsonl", "valid.jsonl") if len(files[n]) + len(group) <= room)
        files[next(fits, "train.jsonl")] += group
    return files


def to_record(question: str, answer: str, form: str) -> dict:
    """Return a record of lora.py's, in one of FORMATS. question: with its "Q: " and "\\nA: ",
    which a chat does without.
    """
    if form == "chat":
        asked = question.removeprefix("Q: ").removesuffix("\nA: ")
        said = {"user": asked, "assistant": answer}
        return {"messages": [{"role": role, "content": said[role]} for role in said]}
    if form == "completion":  # words have their spaces before them
        prompt = question.rstrip(" ")
        return {"prompt": prompt, "completion": question[len(prompt) :] + answer}
    return {"text": question + answer}


def to_text(record: dict) -> str:
    """Return the text of a record of `to_record`."""
    if "messages" in record:
        question, answer = (message["content"] for message in record["messages"])
        return f"Q: {question}\nA: {answer}"
    return record["prompt"] + record["completion"] if "prompt" in record else record["text"]


def write_files(
    files: dict[str, list[Line]], spool: Spool, folder: Path, form: str = "text"
) -> None:
    """Write each file under another name, and rename all when all are whole."""
    partial_files = {name: folder / f"{name}.partial" for name in files}
    try:
        for name, lines in files.items():
            with open(partial_files[name], "w", encoding="utf-8") as file:
                for line in lines:
                    question = QUESTION.format(name=line.name, package=line.package)
                    answer = f"{line.dotted_name} {spool.read(line)}"
                    file.write(json.dumps(to_record(question, answer, form)) + "\n")
        for name in files:
            os.replace(partial_files[name], folder / name)
    finally:
        for path in partial_files.values():
            path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------
# The run


def build_parser() -> argparse.ArgumentParser:
    """Return the flags of this script, whose defaults are the constants above."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "packages",
        nargs="*",
        metavar="PACKAGE",
        default=PACKAGE_NAMES,
        help=f"packages to read (default: {' '.join(PACKAGE_NAMES)})",
    )
    parser.add_argument("--data-folder", default=DATA_FOLDER, help="folder to write")
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count(),
        help="packages to read at a time (default: as many as there are cores)",
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="what a record is")
    parser.add_argument("--tokenizer", help="a tokenizer.model, to count tokens with")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files in the folder that this script did not make, or made of other packages",
    )
    return parser


def create_dataset(
    packages: list[str],
    folder: Path,
    processes: int,
    tokenizer: str | None,
    overwrite: bool = False,
    form: str = "text",
) -> dict[str, str]:
    """Read the packages, clean and split their docstrings, and write the files. Return the
    packages that have no record, and why.

    Raises ValueError when there is nothing to write, or when `folder` holds what this script did
    not make, or made of other packages; FileNotFoundError or ValueError when `tokenizer` is no
    SentencePiece model.
    """
    packages = list(dict.fromkeys(packages))
    check_folder(folder, packages, overwrite)
    count_tokens = load_tokenizer(tokenizer) if tokenizer else None
    with tempfile.TemporaryFile() as file:
        # Read all docstrings, and make each question one object's.
        spool = Spool(file)
        skipped = read_packages(packages, spool.append, processes, reading_settings())
        lines = make_unique(sorted(spool.lines))

        # Note which packages have none.
        found = {line.package for line in lines}
        empty = {name: why_empty(name, skipped.get(name)) for name in packages if name not in found}
        skipped |= empty

        # Split them, near copies together, and write the files.
        from parts.near_copies import group_near_copies  # here: NumPy is not for the readers

        groups = group_near_copies(map(spool.read, lines)) if lines else []
        files = split(lines, groups)
        if not all(files.values()):
            raise ValueError(
                f"{', '.join(packages)} gave {len(set(groups))} different docstrings, too few for "
                f"three files: name installed packages{in_brackets(skipped)}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_files(files, spool, folder, form)

    # Say what was skipped, and what the files hold.
    for line in by_reason(skipped):
        print(f"skipped {line}")
    for name in files:
        summarize(folder / name, count_tokens)
    return empty


def check_folder(folder: Path, packages: list[str], overwrite: bool) -> None:
    """Raise ValueError, NotADirectoryError or IsADirectoryError where the files cannot be written,
    or would replace what this script did not make, or made of other packages.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise NotADirectoryError(f"--data-folder {folder} is a file: name a folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"nothing can be written into {existing}: name another --data-folder")
    for path in (folder / name for name in DATASET):
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder: move it, or name another")
        if os.path.lexists(path) and not path.is_file():
            raise ValueError(f"{path} is no file: move it, or name another --data-folder")
        if not path.exists() or overwrite:
            continue
        found = packages_in(path)
        if found is None:
            raise ValueError(
                f"{path} is not of this script: name another --data-folder, or give --overwrite"
            )
        others = sorted(found - set(packages))
        if others:
            raise ValueError(
                f"{path} holds records of {', '.join(others)}: name another --data-folder, or give "
                "--overwrite"
            )


def packages_in(path: Path) -> set[str] | None:
    """Return the packages of the records in a file; None where this script did not write a line."""
    pattern = re.compile(
        re.escape(QUESTION).replace("\\{name\\}", ".+?").replace("\\{package\\}", "(.+?)")
    )
    packages = set()
    try:
        with open(path, "rb") as file:
            for line in iter(lambda: file.readline(LONGEST_LINE), b""):
                packages.add(pattern.match(to_text(json.loads(line)))[1])
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return packages


def reading_settings() -> Settings:
    """Return what the constants of this file say about reading a package."""
    clean = docstrings.clean if PREPROCESS else docstrings.truncate
    return Settings(
        clean=partial(clean, limit=SEQ_LIMIT),
        batch_size=BATCH_SIZE,
        module_seconds=MODULE_SECONDS,
        package_seconds=PACKAGE_SECONDS,
        grace_seconds=GRACE_SECONDS,
    )


def why_empty(package: str, reason: str | None) -> str:
    """Return why a package has no record: its name may be that of a distribution."""
    names = names_of_distribution(package)
    if not names and not all(map(str.isidentifier, package.split("."))):
        return "it is no name of a package: give the name that an import has"
    if names and package not in names:
        return f"{package} is imported as {', '.join(names)}"
    return reason or "nothing public in it has a docstring of its own"


def by_reason(skipped: dict[str, str]) -> list[str]:
    """Return a line for each reason, with the first of the modules that were skipped for it."""
    groups: dict[str, list[str]] = {}
    for name in sorted(skipped):
        groups.setdefault(skipped[name], []).append(name)
    return [f"{some_of(names)}: {reason}" for reason, names in groups.items()]


def some_of(names: list[str], most: int = 5) -> str:
    """Return the first `most` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def in_brackets(skipped: dict[str, str]) -> str:
    """Return what was skipped as the end of a line, or nothing."""
    return f" (skipped {'; '.join(by_reason(skipped))})" if skipped else ""


def load_tokenizer(path: str) -> Callable[[str], int]:
    """Return a function that counts the tokens of a text, by the `tokenizer.model` at `path`.

    Raises FileNotFoundError or ValueError.
    """
    from sentencepiece import SentencePieceProcessor

    if not Path(path).is_file():
        raise FileNotFoundError(f"--tokenizer {path} does not exist: name a tokenizer.model")
    check_content(path)
    try:
        model = SentencePieceProcessor(model_proto=Path(path).read_bytes())
    except RuntimeError as error:
        raise ValueError(f"--tokenizer {path} is not a SentencePiece model: {error}") from error
    return lambda text: len(model.encode(text))


def summarize(path: Path, count_tokens: Callable[[str], int] | None) -> None:
    """Print how many records, tokens and characters a file holds."""
    n_records = n_tokens = longest = 0
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            text = to_text(json.loads(line))
            n_records, longest = n_records + 1, max(longest, len(text))
            n_tokens += count_tokens(text) if count_tokens else 0
    tokens = f", {n_tokens} tokens" if count_tokens else ""
    print(f"{path}: {n_records} records{tokens}, the longest {longest} characters")


def run(args: argparse.Namespace) -> None:
    """Make the data set. A package that gave nothing is a failure, after the rest is written."""
    if args.processes < 1:
        build_parser().error("--processes is at least 1")
    folder, form = Path(args.data_folder), args.format
    empty = create_dataset(
        args.packages, folder, args.processes, args.tokenizer, args.overwrite, form
    )
    if empty:
        raise RuntimeError(f"no records of {'; '.join(by_reason(empty))}. The others are there")


def main() -> None:
    cli.run(build_parser(), run)


if __name__ == "__main__":
    main()
