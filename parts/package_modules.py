"""Import all public modules of a package, whatever they do, and find what was installed with it."""

import importlib
import os
import pkgutil
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from itertools import islice
from pathlib import Path
from types import ModuleType

from parts.foreign import TookTooLong, attribute, describe, is_a, own_attributes, time_limit

# A package's tests, and the libraries of other people that it brings along.
NO_LIBRARY = re.compile(
    r"_?(conftest|tests|self_?tests?|test_?suites?|unit_?tests?"
    r"|vendor(ed)?|externals?|extern|third_?party)",
    re.IGNORECASE,
)
MOST_FOLDERS = 1000  # of a package's `__path__`
TEST_MODULE = re.compile(r"tests?_.*|.*_tests?", re.IGNORECASE)


def import_modules(
    package: str,
    left_out: set[str],
    tell: Callable[..., None],
    module_seconds: float,
    deadline: float,
) -> dict[str, ModuleType]:
    """Import a package and the public modules below it; returns them by the names that import them.

    `left_out` modules are not imported. None may take longer than `module_seconds`, and none is
    imported after `deadline`, in seconds of `time.monotonic`. Tells ("import", name) before each,
    and ("slow", name), ("late", name) or ("skip", name, reason) where that fails. Raises what the
    package's own import raises.
    """
    tell("import", package)
    with time_limit(module_seconds):
        modules = {package: importlib.import_module(package)}
    if not is_a(modules[package], ModuleType):
        raise TypeError(f"{type(modules[package]).__name__} stands in the module's place")
    listed: set[str] = set()
    queue = deque([package])
    while queue:
        parent = queue.popleft()
        for name in (f"{parent}.{found}" for found in submodules(modules[parent], listed)):
            seconds = min(module_seconds, deadline - time.monotonic())
            if name in left_out:
                continue
            tell("import", name)
            try:
                if seconds <= 0:
                    raise TookTooLong
                with time_limit(seconds):
                    modules[name] = importlib.import_module(name)
                queue.append(name)
            except TookTooLong:
                tell("late" if time.monotonic() >= deadline else "slow", name)
            except BaseException as error:  # whatever a foreign module may raise
                tell("skip", name, describe(error))
    return modules


def submodules(module: object, listed: set[str]) -> Iterator[str]:
    """The names of the public modules in a package's folders, but for folders `listed` before: a
    `__path__` can lead back to where it came from. Adds to `listed`.
    """
    # What a module says of itself, not what its `__getattr__` makes up.
    attributes = own_attributes(module) if is_a(module, ModuleType) else {}
    folders = []
    with suppress(Exception):  # a `__path__` may be anything; of a string, Python takes the letters
        path = attributes.get("__path__", ())
        path = () if is_a(path, str) else islice(path, MOST_FOLDERS)
        folders = [os.path.realpath(folder) for folder in path]
    is_namespace = attributes.get("__file__") is None or len(folders) > 1
    for folder in folders:
        if folder in listed:
            continue
        listed.add(folder)
        names = {found.name for found in pkgutil.iter_modules([folder])}
        if is_namespace:
            names |= namespaces(Path(folder))
        yield from sorted(name for name in names if is_imported(name, folder))


def namespaces(folder: Path, above: frozenset[str] = frozenset()) -> set[str]:
    """The names of the folders that are packages without an `__init__.py`.

    above: the folders that led to this one; a link may lead back to one of them, or out of them.
    """
    real = os.path.realpath(folder)
    above |= {real, *map(str, Path(real).parents)}
    with suppress(OSError):
        return {
            path.name
            for path in folder.iterdir()
            if path.is_dir() and is_imported(path.name, folder)
            if os.path.realpath(path) not in above
            if holds_modules(path) or namespaces(path, above)
        }
    return set()


def holds_modules(folder: Path) -> bool:
    """Whether a folder holds packages or Python files; a library in C may lie in any."""
    found = pkgutil.iter_modules([str(folder)])
    return any(module.ispkg or (folder / f"{module.name}.py").exists() for module in found)


def is_imported(name: str, folder: str | Path) -> bool:
    """Whether a module is public, and a part of the library. `test` is where it holds no tests."""
    if name == "test":
        path = Path(folder, name)
        patterns = ("test_*", "*_test.py", "tests*")
        return path.is_dir() and not any(next(path.glob(p), None) for p in patterns)
    is_test = NO_LIBRARY.fullmatch(name) or TEST_MODULE.fullmatch(name)
    return name.isidentifier() and not name.startswith("_") and not is_test


def is_library(module: str, package: str) -> bool:
    """Whether a module, by its dotted name, is of a package, and not its tests or vendored."""
    below = module.removeprefix(package)
    if below == module or below[:1] not in ("", "."):
        return False
    return not any(map(NO_LIBRARY.fullmatch, below.split(".")))


def sibling_packages(name: str, package: ModuleType) -> set[str]:
    """The import packages that were installed together with this one, and itself.

    `_pytest` comes with pytest. Who shares a namespace has nothing else in common.
    """
    siblings = {name}
    if attribute(package, "__file__") is not None:
        folders = [folder for folder in sys.path if is_a(folder, str)]  # others have no effect
        for distribution in metadata.distributions(path=folders):
            names = top_level_names(distribution)
            if name in names:
                siblings |= names
    return siblings


def names_of_distribution(name: str) -> list[str]:
    """What a distribution is imported as, ["PIL"] for "Pillow"; empty where there is none."""
    with suppress(metadata.PackageNotFoundError, ValueError):
        names = top_level_names(metadata.distribution(name))
        return sorted(found for found in names if not found.startswith("_"))
    return []


def top_level_names(distribution: metadata.Distribution) -> set[str]:
    """The import packages and modules in a distribution's list of files."""
    names = set()
    for line in (distribution.read_text("RECORD") or "").splitlines():
        first, slash, _ = line.partition("/")
        module, dot, suffix = first.partition(",")[0].partition(".")
        if (slash and not dot) or (not slash and suffix.endswith(("py", "so", "pyd"))):
            names.add(module)
    names |= set((distribution.read_text("top_level.txt") or "").split())
    return {name for name in names if name.isidentifier() and name != "__pycache__"}
