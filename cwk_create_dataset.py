"""Make a data set for lora.py out of the docstrings of installed packages.

python cwk_create_dataset.py
python cwk_create_dataset.py numpy networkx --data-folder my-data

Writes train.jsonl, valid.jsonl and test.jsonl with one record a public object, such as
{"text": "Q: What is ReLU in mlx?\\nA: mlx.nn.ReLU Applies the Rectified Linear Unit. ..."}
"""

import argparse
import hashlib
import importlib
import inspect
import json
import math
import multiprocessing
import os
import pkgutil
import random
import re
import signal
import sys
import tempfile
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Lock
from types import MappingProxyType, ModuleType
from typing import BinaryIO, NamedTuple, NoReturn

from tqdm import tqdm

SEQ_LIMIT = 2048  # characters of a docstring at most
TEST_SET_SIZE = 0.1  # share of the records that are the test set; the validation set is as large
PACKAGE_NAMES = ["mlx"]  # whose docstrings to take
DATA_FOLDER = "mlx-doc-data"  # where to write the files
DATASET = {"train.jsonl": None, "valid.jsonl": None, "test.jsonl": None}  # the files' names
BATCH_SIZE = 1000  # docstrings that a process hands over at once
PREPROCESS = True  # make docstrings fit to learn from, or leave them as they are

MODULE_SECONDS = 120  # that the import of a module may take
PACKAGE_SECONDS = 1800  # that a package may take
# Modules that are no part of the library.
NOT_IMPORTED = re.compile(r"_.*|conftest|tests?|test_.*|.*_tests?")


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


def import_modules(package: str, left_out: set[str], tell: Callable[..., None]) -> ModuleType:
    """Import a package and every public module below it but those left out; gives the package.

    Tells of each module before it is imported, and again when it cannot be.
    """
    tell("import", package)
    root = importlib.import_module(package)
    queue = deque([root])
    while queue:
        parent = queue.popleft()
        # What a module says of itself, not what its `__getattr__` makes up.
        attributes = vars(parent) if is_a(parent, ModuleType) else {}
        for found in pkgutil.iter_modules(attributes.get("__path__", [])):
            name = f"{attributes['__name__']}.{found.name}"
            if NOT_IMPORTED.fullmatch(found.name) or name in left_out:
                continue
            tell("import", name)
            try:
                queue.append(importlib.import_module(name))
            except BaseException as error:  # whatever a foreign module may raise
                tell("skip", name, describe(error))
    return root


def describe(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:100].rstrip(": ")


def is_a(value: object, kind: type | tuple[type, ...]) -> bool:
    """`isinstance` by the real type: a proxy's `__class__` may run code, and fail."""
    return issubclass(type(value), kind)


def attribute(value: object, name: str) -> object:
    """An attribute of a foreign object, or None where looking it up fails, however it does."""
    try:
        return getattr(value, name, None)
    except BaseException:
        return None


def own_attributes(value: object) -> Mapping:
    """`vars`, or nothing where that fails."""
    attributes = attribute(value, "__dict__")
    return attributes if is_a(attributes, (dict, MappingProxyType)) else {}


def public_members(owner: object) -> Iterator[tuple[str, object]]:
    """Names and values that a module or class holds itself, nothing private or inherited; of a
    module also what its `__all__` names, which may be made when it is first asked for.
    """
    members = {name: value for name, value in own_attributes(owner).items() if is_a(name, str)}
    listed = members.get("__all__") if is_a(owner, ModuleType) else ()
    for name in listed if is_a(listed, (list, tuple)) else ():
        if is_a(name, str) and name not in members:
            members[name] = attribute(owner, name)
    for name, value in sorted(members.items(), key=lambda item: item[0]):
        if not name.startswith("_"):
            yield name, value.__func__ if is_a(value, (classmethod, staticmethod)) else value


def belongs_to(value: object, package: str) -> bool:
    """Whether a value is a part of the package, and not imported into it from elsewhere."""
    if is_a(value, property):
        return True
    home = attribute(value, "__name__" if is_a(value, ModuleType) else "__module__")
    if not is_a(home, str):  # as for the methods of compiled classes
        home = attribute(attribute(value, "__objclass__"), "__module__")
    if not is_a(home, str):
        home = package
    return home == package or home.startswith(f"{package}.")


def own_docstring(value: object) -> str | None:
    """The docstring of a module, class, function or property, unless it is its type's."""
    if not (is_a(value, (ModuleType, property)) or callable(value)):
        return None
    is_class = is_a(value, type)
    docstring = own_attributes(value).get("__doc__") if is_class else attribute(value, "__doc__")
    if not is_a(docstring, str) or docstring == type(value).__doc__:
        return None
    if is_class and is_generated(docstring, value):
        return None
    # Half a character cannot be written to a file.
    return inspect.cleandoc(docstring).strip().encode("utf-8", "replace").decode() or None


def is_generated(docstring: str, value: type) -> bool:
    """Whether Python wrote a class's docstring, as for data classes and named tuples."""
    signature = re.escape(str(attribute(value, "__name__"))) + r"\(.*\)( -> None)?"
    return "\n\n" not in docstring and bool(re.fullmatch(signature, docstring, re.DOTALL))


def find_objects(package: ModuleType) -> Iterator[tuple[str, str, object]]:
    """Every public object of a package once, as (name, dotted name, object).

    Level by level, so that an object's path is the shortest public one; of several, the one where
    it was defined, else the alphabetically first. A member of a class is named with it.
    """
    yield package.__name__, package.__name__, package
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
            if is_a(value, ModuleType):
                level.append(("", path, value))
            elif is_a(value, type):
                level.append((f"{name}.", path, value))


def home(value: object) -> str:
    """The dotted name under which an object was defined, as far as it knows."""
    parts = attribute(value, "__module__"), attribute(value, "__qualname__")
    return ".".join(part for part in parts if is_a(part, str))


def find_records(package: ModuleType) -> Iterator[Record]:
    """A record, with its docstring made fit to learn from, of each documented object."""
    for name, dotted_name, value in find_objects(package):
        docstring = clean(own_docstring(value) or "")
        if docstring:
            yield Record(package.__name__, name, dotted_name, docstring)


# -------------------------------------------------------------------------------------------------
# Reading packages, each in processes of its own, since importing runs the package's code


def read_package(package: str, left_out: set[str], connection: Connection) -> None:
    """What such a process does: send what it imports, what it skips, and batches of records."""
    own_pid = os.getpid()

    def tell(*message: object) -> None:
        if os.getpid() != own_pid:
            os._exit(0)  # a module has forked: one of the two goes on
        connection.send(message)

    be_alone()
    try:
        records = find_records(import_modules(package, left_out, tell))
        while batch := list(islice(records, BATCH_SIZE)):
            tell("records", batch)
        tell("end")
    except BaseException as error:  # whatever a foreign package may raise
        tell("skip", package, describe(error))
        tell("end")
    connection.close()
    os._exit(0)  # whatever threads the package has started


def be_alone() -> None:
    """Keep what a package prints, asks for or shows away from the user."""
    if hasattr(os, "setsid"):
        os.setsid()  # so that it can be ended with all processes that it starts
    with open(os.devnull, "r+") as nothing:
        for stream in (0, 1, 2):
            os.dup2(nothing.fileno(), stream)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        os.environ.pop(name, None)
    os.environ |= {"MPLBACKEND": "Agg", "QT_QPA_PLATFORM": "offscreen", "SDL_VIDEODRIVER": "dummy"}


@contextmanager
def reader(package: str, left_out: set[str]) -> Iterator[tuple[Connection, Callable[[], str]]]:
    """A process that reads a package: what it sends, and a function that says how it ended."""
    os.environ["PYTHONHASHSEED"] = "0"  # some docstrings print sets, which then have one order
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe(duplex=False)
    process = context.Process(target=read_package, args=(package, left_out, theirs))
    process.start()
    theirs.close()

    def ending() -> str:
        process.join(5)
        code = process.exitcode
        if code is None:
            return "it closed its connection"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"it exited with {code}"

    try:
        yield connection, ending
    finally:
        end(process)


def end(process: BaseProcess) -> None:
    """Kill a process with all that it has started."""
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg") and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def collect(package: str, take: Callable[[list[Record]], None], stopped: Event) -> dict[str, str]:
    """Hand the records of a package to `take`; gives the modules that were skipped, and why.

    A module that ends its process, or takes too long, is left out in the next one. When `stopped`
    is set there is no next one.
    """
    skipped, deadline = {}, time.monotonic() + PACKAGE_SECONDS
    while True:
        current, handed_over = package, False
        with reader(package, set(skipped)) as (connection, ending):
            try:
                while True:
                    left = deadline - time.monotonic()
                    if not connection.poll(max(0, min(left, MODULE_SECONDS))):
                        reason = f"it took longer than {MODULE_SECONDS} s"
                        if left < MODULE_SECONDS:
                            reason = f"the package took longer than {PACKAGE_SECONDS} s"
                        break
                    kind, *content = connection.recv()
                    if kind == "import":
                        current = content[0]
                    elif kind == "skip":
                        skipped[content[0]] = content[1]
                    elif kind == "records":
                        handed_over = True
                        take(content[0])
                    else:
                        return skipped
            except EOFError:
                reason = ending()
        skipped[current] = reason
        too_late = time.monotonic() > deadline or stopped.is_set()
        if current == package or handed_over or too_late:
            return skipped


# -------------------------------------------------------------------------------------------------
# Cleaning


ROLE = re.compile(r":[\w:+.-]+:`([^`]*)`")
# A directive, what stands after it, and its options.
DIRECTIVE = re.compile(r"^( *)\.\. ([\w:-]+)::[ \t]*(.*)((?:\n\1 +:[\w-]+:.*)*)$", re.MULTILINE)
SHOWN_AS = {"versionadded": "New in version", "versionchanged": "Changed in version"}
SHOWN_AS |= {"deprecated": "Deprecated since version"}
NOT_SHOWN = {"code", "code-block", "sourcecode", "highlight", "currentmodule", "module", "plot"}


def clean(docstring: str) -> str:
    """Make a docstring plain text, and no longer than SEQ_LIMIT.

    reStructuredText roles and directives become the text that a reader sees; the summary is a
    paragraph of its own; trailing space, runs of blank lines and memory addresses go.
    """
    if PREPROCESS:
        text = ROLE.sub(lambda match: visible(match[1]), docstring)
        text = DIRECTIVE.sub(shown, text)
        text = re.sub(r" at 0x[0-9a-fA-F]+(?=>)", "", text)  # another at each run
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


def shown(directive: re.Match) -> str:
    """The text that a reader sees of a directive's line."""
    indent, name, argument, _ = directive.groups()
    if name in NOT_SHOWN:
        return ""
    return f"{indent}{SHOWN_AS[name]} {argument}" if name in SHOWN_AS else f"{indent}{argument}"


def cut(text: str, limit: int) -> str:
    """The text, or what of it `limit` takes: whole paragraphs or lines if they are half as much,
    else whole words or characters. A doctest line stays whole.
    """
    if len(text) <= limit:
        return text
    head = text[: limit + 1]
    in_doctest = head.rsplit("\n", 1)[-1].lstrip().startswith((">>>", "..."))
    least = 0 if in_doctest else limit / 2
    for end, least_kept in (("\n\n", least), ("\n", least), (" ", math.inf if in_doctest else 0)):
        at = head.rfind(end)
        if at > least_kept:
            return head[:at].rstrip()
    while limit and unicodedata.combining(text[limit]):
        limit -= 1
    return text[:limit]


# -------------------------------------------------------------------------------------------------
# Splitting and writing


class Line(NamedTuple):
    """A record written to the spool: what sorts it, its docstring's digest, place and length."""

    package: str
    dotted_name: str
    docstring: bytes
    start: int
    size: int


class Spool:
    """The records as JSON lines in a temporary file, so that memory holds none of the texts."""

    def __init__(self, file: BinaryIO):
        self.file, self.lines = file, []

    def take(self, records: list[Record]) -> None:
        for record in records:
            line = (json.dumps({"text": record.text()}) + "\n").encode()
            digest = hashlib.sha256(record.docstring.encode()).digest()
            place = self.file.tell(), len(line)
            self.lines.append(Line(record.package, record.dotted_name, digest, *place))
            self.file.write(line)

    def read(self, line: Line) -> bytes:
        self.file.seek(line.start)
        return self.file.read(line.size)


def split(lines: list[Line]) -> dict[str, list[Line]]:
    """Share the records out to the files of DATASET; the same records give the same files.

    Records with one docstring stay together, so that none is both trained on and tested. Where
    such groups are few, a file may stay empty.
    """
    groups = {}
    for line in sorted(lines):
        groups.setdefault(line.docstring, []).append(line)
    shuffled = list(groups.values())
    random.Random(0).shuffle(shuffled)

    held_out = max(1, round(TEST_SET_SIZE * len(lines)))
    files = {name: [] for name in DATASET}
    for group in shuffled:
        fits = (n for n in ("test.jsonl", "valid.jsonl") if len(files[n]) + len(group) <= held_out)
        files[next(fits, "train.jsonl")] += group
    return files


def write_files(files: dict[str, list[Line]], spool: Spool, folder: Path) -> None:
    """Write each file beside its place, and move all there when all are whole."""
    beside = {name: folder / f"{name}.partial" for name in files}
    try:
        for name, lines in files.items():
            with open(beside[name], "wb") as file:
                file.writelines(map(spool.read, lines))
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
        message = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def create_dataset(
    packages: list[str], folder: Path, processes: int, tokenizer: str | None
) -> None:
    """Read the packages, clean and split their docstrings, and write the files.

    Raises ValueError when there is nothing to write, FileNotFoundError or ValueError when
    `tokenizer` is no SentencePiece model.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--data-folder {folder} is a file: name a folder")
    for name in DATASET:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} is a folder: move it, or name another")
    count_tokens = load_tokenizer(tokenizer) if tokenizer else None
    packages = list(dict.fromkeys(packages))
    with tempfile.TemporaryFile() as file:
        spool, lock = Spool(file), Lock()

        def take(records: list[Record]) -> None:
            with lock:
                spool.take(records)

        skipped = read_all(packages, take, processes)
        files = split(spool.lines)
        if not all(files.values()):
            n_different = len({line.docstring for line in spool.lines})
            raise ValueError(
                f"{', '.join(packages)} gave {n_different} different docstrings, too few for three "
                f"files: name installed packages{says(skipped)}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_files(files, spool, folder)
    for module, reason in sorted(skipped.items()):
        print(f"skipped {module}: {reason}")
    for name in files:
        summarize(folder / name, count_tokens)


def read_all(
    packages: list[str], take: Callable[[list[Record]], None], processes: int
) -> dict[str, str]:
    """Hand the records of all packages to `take`; gives the skipped modules, and why."""
    skipped, stopped = {}, Event()
    with ThreadPoolExecutor(processes) as pool:
        readings = pool.map(lambda package: collect(package, take, stopped), packages)
        try:
            for found in tqdm(readings, "Reading", len(packages), unit=" packages", disable=None):
                skipped |= found
        except BaseException:  # Ctrl-C, or a full disk
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                end(process)
            raise
    return skipped


def says(skipped: dict[str, str]) -> str:
    reasons = "; ".join(f"{module}: {reason}" for module, reason in sorted(skipped.items()))
    return f" (skipped {reasons})" if reasons else ""


def load_tokenizer(path: str) -> Callable[[str], int]:
    """A function that counts tokens. Raises FileNotFoundError or ValueError."""
    from sentencepiece import SentencePieceProcessor

    if not Path(path).is_file():
        raise FileNotFoundError(f"--tokenizer {path} does not exist: name a tokenizer.model")
    try:
        model = SentencePieceProcessor(model_proto=Path(path).read_bytes())
    except RuntimeError as error:
        raise ValueError(f"--tokenizer {path} is not a SentencePiece model: {error}") from error
    return lambda text: len(model.encode(text))


def summarize(path: Path, count_tokens: Callable[[str], int] | None) -> None:
    """Print how much a file holds."""
    n_records = n_tokens = longest = 0
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            n_records, longest = n_records + 1, max(longest, len(text))
            n_tokens += count_tokens(text) if count_tokens else 0
    tokens = f", {n_tokens} tokens" if count_tokens else ""
    print(f"{path}: {n_records} records{tokens}, the longest {longest} characters")


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
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count(),
        help="packages to read at a time (default: as many as there are cores)",
    )
    parser.add_argument("--tokenizer", help="a tokenizer.model, to count tokens with")
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  closed by whoever called
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows question marks
    args = parser.parse_args()
    if args.processes < 1:
        parser.error("--processes is at least 1")
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))  # and end the readers
    try:
        create_dataset(args.packages, Path(args.data_folder), args.processes, args.tokenizer)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        fail(error, 2)  # the user can mend it
    except (OSError, MemoryError, RuntimeError) as error:
        fail(error, 1)  # the machine failed


if __name__ == "__main__":
    main()
