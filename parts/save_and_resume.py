"""Save a run so that a kill at any moment, even `kill -9`, loses nothing that was saved; resume it.

Adapters and state are two files, which no system replaces at once; after a better validation, the
best adapters are a third. The protocol of a save:

1. Write the new adapters to adapters.npz.partial, and new best ones to adapters.best.npz.partial.
   Wait until they are on the disk.
2. Write the state to adapters.state.npz.partial; it names the SHA-256 of the new adapters and of
   those that they replace, and the same of the best.
3. Rename the state into its place. Before, a kill leaves the last save; from now on it is this one.
4. Rename best and adapters into theirs. A kill before that leaves them partial: when the run is
   resumed, `recover_interrupted_save` checks them against the state, and does this step.

A better validation is saved at once, so that the best adapters are never newer than the state.

The state is all that a run needs to continue as if it had never been interrupted. Training draws no
random numbers but those of the data's order, which depends on the seed and the epoch alone, and of
dropout, which depends on the seed and the batch's number alone.
"""

import io
import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts.adapters import (
    LORA_SCALE,
    parse_adapter,
    scale_of,
    to_numpy,
    to_vector,
    write_adapter,
)
from parts.best import Best
from parts.cli import warn
from parts.files import atomic_write, digest, partial_file
from parts.fingerprint import check_fingerprint, instead_of
from parts.ranks import Ranks
from parts.run_files import sibling
from parts.run_log import Meter, StepResult, say

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_map_with_path


class NotSaved(OSError):
    """The last save failed."""

    def __init__(self, adapter_file: str | Path):
        super().__init__(f"the adapters of the last step could not be saved to {adapter_file}")


class Snapshot(NamedTuple):
    """A run as it was when an iteration was computed to its end."""

    iteration: int
    steps: list[StepResult]  # not reported yet
    seconds: float  # that these took
    matrices: dict  # what the model trains, as a tree
    moments: dict  # the optimizer's state, as a tree
    best: Best = Best()
    start_loss: float = math.nan  # see Meter
    warned: bool = False
    scale: float = LORA_SCALE


class RunState:
    """Where a run is: the matrices of `model`, the moments of `optimizer`, the steps of `meter`.

    fingerprint: of `run_fingerprint`. adapter_file: where to save, the state next to it. Every rank
    makes each call; rank 0 alone reads and writes files.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        meter: Meter,
        fingerprint: dict,
        adapter_file: str | Path,
        ranks: Ranks,
    ):
        self.model, self.optimizer, self.meter = model, optimizer, meter
        self.fingerprint, self.adapter_file, self.ranks = fingerprint, adapter_file, ranks
        self.best = Best()
        self._saved = True  # the last time
        self._kept: Snapshot | None = None

    def resume(self, adapter_file: str | Path, last: int) -> None:
        """Continue the run whose state is next to this adapter file. Where there is no state, or it
        is of other adapters, say so: a new run begins.

        last: the iteration at which this run ends.
        Raises ValueError when the state is damaged, of another run, or beyond `last`.
        """
        adapter, path = Path(adapter_file), sibling(adapter_file, ".state.npz")
        adapter_content = self.ranks.read(adapter)
        if adapter_content is None:
            say(f"A new run begins from the weights in {adapter}, which is another library's")
            return
        content = self.ranks.read(path)
        if content is None:
            say(f"A new run begins from the weights in {adapter}: there is no {path}")
            is_best = adapter.resolve() == sibling(self.adapter_file, ".best.npz").resolve()
            if is_best and self.ranks.rank == 0:
                self.best = Best(digest=digest(adapter.read_bytes()))
            return
        try:
            with np.load(io.BytesIO(content)) as archive:
                state = dict(archive)
            fingerprint, adapter_digest = json.loads(str(state["run"])), state["files"][0]
            self.optimizer.init({"lora": to_vector(self.model.trainable_parameters())})
            saved = self._parse(state)
        except Exception as error:  # a damaged archive raises almost anything
            raise ValueError(f"{path} is damaged ({error}); {instead_of(path)}") from error
        if digest(adapter_content) != adapter_digest:
            say(f"A new run begins from the weights in {adapter}: {path} is of other adapters")
            return
        check_fingerprint(fingerprint, self.fingerprint, path)
        if saved.iteration > last:
            raise ValueError(
                f"{path} is of iteration {saved.iteration}, and this run ends at {last}: --iters "
                "and --epochs count from the start"
            )
        self.best = self._find_best(saved.best, adapter)
        self.model.update(saved.matrices)
        self.optimizer.state.update(saved.moments)
        self.meter.iteration = saved.iteration
        self.meter.steps, self.meter.seconds = saved.steps, saved.seconds
        self.meter.start_loss, self.meter.warned = saved.start_loss, saved.warned
        say(f"The run resumes after iteration {saved.iteration}")

    def _parse(self, state: dict[str, np.ndarray]) -> Snapshot:
        """Return the run that a state file holds. Raises KeyError or ValueError."""

        def like(tree: dict, prefix: str) -> dict:
            return tree_map_with_path(lambda name, _: mx.array(state[f"{prefix}.{name}"]), tree)

        return Snapshot(
            iteration=int(state["iteration"]),
            steps=[StepResult(*row) for row in state.get("done", [])],
            seconds=float(state.get("seconds", 0)),
            matrices=like(self.model.trainable_parameters(), "adapter"),
            moments=like(self.optimizer.state, "optimizer"),
            best=parse_best(state),
            start_loss=float(state.get("start_loss", math.nan)),
            warned=bool(state.get("warned", False)),
        )

    def _find_best(self, best: Best, adapter: Path) -> Best:
        """Return the best validation with its matrices, where they are to be written again."""
        if not best.iteration:
            return best
        path = sibling(adapter, ".best.npz")
        content = self.ranks.read(path)
        if content is None or digest(content) != best.digest:
            say(f"{path} is not what this run saved: a later validation becomes the best")
            return best.forget()
        elsewhere = sibling(self.adapter_file, ".best.npz").resolve() != path.resolve()
        if any(self.ranks.sum_values(elsewhere and self.ranks.rank == 0)):
            return best._replace(matrices=parse_adapter(content, path))
        return best

    def compare(self, iteration: int, val_loss: float) -> None:
        """Compare a validation with the best before; `save` writes the matrices of a better one.

        iteration: 0 before the first update. The device has computed the matrices.
        """
        self.best = self.best.compare(iteration, val_loss, self.model.trainable_parameters())
        self.keep()

    @property
    def has_new_best(self) -> bool:
        """Whether the best matrices are still to be saved."""
        return self.best.matrices is not None

    def save(self) -> None:
        """Save on rank 0, and wait for it. On failure, warn; training continues, and a later save
        may succeed.
        """
        failed, new_best, best_digest = False, self.has_new_best, self.best.digest
        if self.ranks.rank == 0:
            try:
                with self.ranks.saving:
                    best_digest = write_run(self.adapter_file, self.snapshot(), self.fingerprint)
            except OSError as error:
                at = self.meter.iteration
                warn(f"iteration {at} could not be saved to {self.adapter_file}: {error}")
                failed = True
        self._saved = not any(self.ranks.sum_values(failed))
        if self._saved and new_best:
            self.best = self.best._replace(matrices=None, digest=best_digest)
            path = sibling(self.adapter_file, ".best.npz")
            say(f"Iter {self.best.iteration}: lowest validation loss so far, saved to {path}")

    def check_saved(self) -> None:
        """Raise NotSaved where the last save failed, on any rank."""
        if not self._saved:
            raise NotSaved(self.adapter_file)

    def snapshot(self) -> Snapshot:
        """Return the run as it is now, whatever later steps do to model and optimizer."""
        matrices = self.model.trainable_parameters()
        moments = tree_map(lambda value: value, self.optimizer.state)
        meter = self.meter
        return Snapshot(
            meter.iteration,
            list(meter.steps),
            meter.seconds,
            matrices,
            moments,
            self.best,
            meter.start_loss,
            meter.warned,
            scale_of(self.model),
        )

    def keep(self) -> None:
        """Keep a snapshot for `saved_on_failure`. The device has computed what it holds."""
        self._kept = self.snapshot()

    @contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """Save before an error ends the block.

        An OSError means that nobody reads the output any more, or that its disk is full: save the
        last step. A RuntimeError or MemoryError is the device's, which has lost the arrays that it
        was computing: save what was kept, on rank 0, if it can still be read, and say so with the
        error. The other ranks are not waited for: theirs may be the error.
        """
        self.keep()
        first = self.meter.iteration
        try:
            yield
        except OSError:
            if self.meter.iteration > first and self.ranks.size == 1:
                self.save()
            raise
        except (RuntimeError, MemoryError) as error:
            if self.ranks.rank > 0 or self._kept.iteration == first:
                raise
            iteration = self._kept.iteration
            try:
                with self.ranks.saving:
                    write_run(self.adapter_file, self._kept, self.fingerprint)
            except (RuntimeError, MemoryError, OSError) as lost:
                warn(f"iteration {iteration} could not be saved to {self.adapter_file}: {lost}")
                raise error from lost
            raise RuntimeError(
                f"{error}; iteration {iteration} is saved, resume with "
                f"--resume-adapter-file {self.adapter_file}"
            ) from error


def write_run(adapter_file: str | Path, snapshot: Snapshot, fingerprint: dict) -> str:
    """Write adapters and state, by the protocol above; its numbers are in the comments. Return the
    digest of the best adapters, "" where there are none.

    Raises OSError, and what the device does where it has not computed the snapshot.
    """
    adapter, best = Path(adapter_file), snapshot.best
    best_path = sibling(adapter, ".best.npz")
    matrices = to_numpy(snapshot.matrices)
    state = {f"adapter.{name}": value for name, value in matrices.items()}
    state |= {f"optimizer.{n}": np.array(v) for n, v in tree_flatten(snapshot.moments)}
    state |= {"iteration": np.array(snapshot.iteration), "run": np.array(json.dumps(fingerprint))}
    state["done"] = np.array(snapshot.steps, float).reshape(-1, len(StepResult._fields))
    state["seconds"] = np.array(snapshot.seconds)
    state["start_loss"], state["warned"] = np.array(snapshot.start_loss), np.array(snapshot.warned)
    state["best"], best_files = best.to_array(), [best.digest]
    with ExitStack() as places:
        if best.matrices is not None:
            best_files = stage(places, best_path, to_numpy(best.matrices), snapshot.scale)  # 1
        state["files"] = np.array(stage(places, adapter, matrices, snapshot.scale))  # 1
        state["best_files"] = np.array(best_files)
        with atomic_write(sibling(adapter, ".state.npz")) as state_file:
            np.savez(state_file, **state)  # 2, and 3 at the end of this block
    # 4 was the end of the outer block
    has_other = not best.iteration and best_path.is_file()
    if has_other and digest(best_path.read_bytes()) != best.digest:
        best_path.unlink()  # another run's, as were the adapters that are replaced
    return best_files[0]


def stage(
    places: ExitStack, path: Path, matrices: dict[str, np.ndarray], scale: float
) -> list[str]:
    """Write an adapter file, which `places` renames into its place when it ends. Return the digest
    of its content and, if there is one, of the file that it replaces. Raises OSError.
    """
    file = places.enter_context(atomic_write(path))
    write_adapter(file, matrices, scale)
    file.flush()
    os.fsync(file.fileno())
    files = [Path(file.name), *([path] if path.is_file() else [])]
    return [digest(each.read_bytes()) for each in files]


def parse_best(state: dict[str, np.ndarray]) -> Best:
    """Return the best validation of a state file; of an older one, that none was compared yet.
    Raises ValueError.
    """
    if "best" not in state:
        return Best(last=int(state["iteration"]))
    return Best.from_array(state["best"], str(state["best_files"][0]))


def recover_interrupted_save(adapter_file: str | Path) -> None:
    """Rename adapters, and the best ones, into the place that a kill has left to those before them,
    where their state is in its own. Raises OSError.
    """
    try:
        with np.load(sibling(adapter_file, ".state.npz")) as archive:
            digests = {name: archive[name].tolist() for name in archive if name.endswith("files")}
    except Exception:  # it is missing, or damaged, which `resume` says
        return
    for name, path in (
        ("files", Path(adapter_file)),
        ("best_files", sibling(adapter_file, ".best.npz")),
    ):
        new, *old = digests.get(name, [""])
        partial = partial_file(path)
        untouched = not path.is_file() or digest(path.read_bytes()) in old
        if partial.is_file() and untouched and digest(partial.read_bytes()) == new:
            os.replace(partial, partial.with_suffix(""))
