"""How much of what a package documents has a record: python inventory.py scipy=objects.inv ...

Each argument names a package and the inventory of its own documentation, which Sphinx writes
(Debian's -doc packages hold one each). Reads the package with the data set script, and prints how
many objects its documentation names, how many of these have a record, and the share; private names,
other packages' objects, and what has no docstring of its own are left out.
"""

import argparse
import functools
import importlib
import inspect
import json
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ROLES = {"module", "class", "exception", "function", "method", "property", "attribute", "data"}


def documented_names(inventory: Path) -> list[str]:
    """The Python objects in a Sphinx inventory, version 2: four lines, then zlib."""
    *_, packed = inventory.read_bytes().split(b"\n", 4)
    names = []
    for line in zlib.decompress(packed).decode().splitlines():
        name, kind, *_ = line.split()
        domain, _, role = kind.partition(":")
        if domain == "py" and role.removeprefix("static").removeprefix("class") in ROLES | {""}:
            names.append(name)
    return names


def recorded_names(package: str) -> list[str]:
    """The dotted names in the data set script's files for a package."""
    with tempfile.TemporaryDirectory() as folder:
        script = [sys.executable, ROOT / "cwk_create_dataset.py", package]
        subprocess.run([*script, "--data-folder", folder], check=True, stdout=subprocess.DEVNULL)
        lines = [line for path in Path(folder).glob("*.jsonl") for line in path.open()]
    return [json.loads(line)["text"].split("\nA: ", 1)[1].split(" ", 1)[0] for line in lines]


@functools.cache
def resolve(name: str) -> object:
    """The object of a dotted name as its class holds it, or None where nothing is there."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:n]))
        except BaseException:
            continue
        for part in parts[n:]:
            try:
                found = inspect.getattr_static(owner, part, None)
                lazy = found is None or inspect.ismodule(owner)
                owner = getattr(owner, part, None) if lazy else found
            except BaseException:
                return None
        return getattr(owner, "__func__", owner)
    return None


def has_docstring(value: object) -> bool:
    docstring = getattr(value, "__doc__", None)
    return isinstance(docstring, str) and docstring.strip() and docstring != type(value).__doc__


def is_foreign(value: object, package: str) -> bool:
    module = getattr(value, "__name__" if inspect.ismodule(value) else "__module__", None)
    if not isinstance(module, str) or module == type(value).__module__:
        module = getattr(getattr(value, "__objclass__", None), "__module__", package)
    return module.split(".")[0] not in (package, f"_{package}")


def measure(package: str, names: list[str], recorded: list[str]) -> tuple[int, int, list[str]]:
    """Documented objects, those with a record, and the names of the others."""
    found = {id(value) for name in recorded if (value := resolve(name)) is not None}
    documented, missing = {}, []
    for name in names:
        value = resolve(name)
        is_private = any(part.startswith("_") for part in name.split("."))
        if is_private or not has_docstring(value) or is_foreign(value, package):
            continue
        if id(value) not in documented and id(value) not in found:
            missing.append(name)
        documented[id(value)] = name
    return len(documented), len(documented) - len(missing), missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("inventories", nargs="+", metavar="PACKAGE=INVENTORY")
    parser.add_argument("--missing", type=int, default=0, help="names without a record to print")
    args = parser.parse_args()
    total_documented = total_recorded = 0
    print(f"{'package':<14} {'documented':>10} {'recorded':>10} {'share':>7}")
    for argument in args.inventories:
        package, _, inventory = argument.partition("=")
        names = documented_names(Path(inventory))
        documented, recorded, missing = measure(package, names, recorded_names(package))
        total_documented, total_recorded = total_documented + documented, total_recorded + recorded
        print(f"{package:<14} {documented:>10} {recorded:>10} {recorded / documented:>7.1%}")
        for name in missing[: args.missing]:
            print(f"    {name}")
    share = total_recorded / total_documented
    print(f"{'all':<14} {total_documented:>10} {total_recorded:>10} {share:>7.1%}")


if __name__ == "__main__":
    main()
