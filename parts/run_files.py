"""The files that a training writes, and which of those that lie in their places are a training's:
what the suite did not make, it does not replace.
"""

import json
from pathlib import Path

from parts.cli import warn

LOG_KEYS = {"iteration", "loss", "val_loss", "tokens"}  # of an entry, those that a plot needs
HEAD = 1 << 20  # bytes of a file that say whose it is
PLOT_TITLE = "Losses of lora.py"  # in each plot, by which it is recognized


def sibling(adapter_file: str | Path, suffix: str) -> Path:
    """`adapters.log.jsonl` for `adapters.npz` and the suffix `.log.jsonl`."""
    path = Path(adapter_file)
    return path.with_name(path.name.removesuffix(".npz") + suffix)


def parse_entry(line: bytes) -> dict | None:
    """An entry of a log, or None for a line that a kill cut off, or that is none of ours."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not entry.keys() >= LOG_KEYS:
        return None
    counts, losses = (entry["iteration"], entry["tokens"]), (entry["loss"], entry["val_loss"])
    is_ours = all(isinstance(count, int) for count in counts) and all(
        isinstance(loss, (int, float, type(None))) for loss in losses
    )
    return entry if is_ours else None


def is_state(path: Path) -> bool:
    """Whether a training saved its state here, whole or damaged since: an archive whose first
    member is one of the adapters.
    """
    head = head_of(path, 64)
    return head.startswith(b"PK") and b"adapter.layers." in head


def is_best(path: Path) -> bool:
    """Whether a training saved its best adapters here: an archive whose first member is of the
    model's layers.
    """
    head = head_of(path, 64)
    return head.startswith(b"PK") and b"layers." in head and not is_state(path)


def head_of(path: Path, size: int = HEAD) -> bytes:
    """The first `size` bytes of a file."""
    with open(path, "rb") as file:
        return file.read(size)


def is_log(path: Path) -> bool:
    """Whether a training kept its log here."""
    return any(map(parse_entry, head_of(path).splitlines()))


def is_plot(path: Path) -> bool:
    """Whether a training drew its losses here. Earlier versions did not sign the plot; one of
    theirs is known by its log.
    """
    log = path.with_suffix(".log.jsonl")
    signature = f"tEXtTitle\0{PLOT_TITLE}".encode()
    return signature in head_of(path) or (log.is_file() and is_log(log))


SIBLINGS = {".best.npz": is_best, ".state.npz": is_state, ".log.jsonl": is_log, ".png": is_plot}


def find_siblings(adapter_file: str | Path) -> list[Path]:
    """The files next to the adapters that training would replace. An empty one does not count.

    Raises ValueError where one of them is no training's.
    """
    found = []
    for suffix, is_ours in SIBLINGS.items():
        path = sibling(adapter_file, suffix)
        if path.is_file() and not path.stat().st_size or not path.exists():
            continue
        if path.is_dir() and not suffix.endswith(".npz"):  # it stays, and training goes on without
            continue
        if not path.is_file() or not is_ours(path):  # it may be a device that a link leads to
            raise ValueError(
                f"--adapter-file {adapter_file} would replace {path}, which no training made: "
                "name another"
            )
        found.append(path)
    return found


def warn_of_replaced(adapter_file: str | Path, resumed_from: str | Path | None) -> None:
    """Warn of what another run wrote, and this one replaces. A run that is resumed from the file
    that it writes replaces its own. Raises what `find_siblings` does.
    """
    adapter = Path(adapter_file)
    if resumed_from is not None and adapter.exists() and adapter.samefile(resumed_from):
        return
    own = [adapter] if adapter.is_file() and adapter.stat().st_size else []
    found = [*own, *find_siblings(adapter)]
    if found:
        names = ", ".join([str(found[0]), *(path.name for path in found[1:])])
        warn(f"another run's files are replaced: {names}")
