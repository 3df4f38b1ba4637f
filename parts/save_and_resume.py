"""Save a run so that a kill at any moment, even `kill -9`, loses nothing that was saved; resume it.

Adapters and state are two files, which no system replaces at once. The protocol of a save:

1. Write the new adapters to adapters.npz.partial, and wait until they are on the disk.
2. Write the state to adapters.state.npz.partial; it names the SHA-256 of the new adapters and of
   those that they replace.
3. Rename the state into its place. Before, a kill leaves the last save; from now on it is this one.
4. Rename the adapters into theirs. A kill before that leaves them partial: when the run is resumed,
   `recover_interrupted_save` checks them against the state, and does this step.

The state is all that a run needs to continue as if it had never been interrupted. Training draws no
random numbers but those of the data's order, which depends on the seed and the epoch alone.
"""

import argparse
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts.adapters import to_numpy, to_vector, write_adapter
from parts.cli import warn
from parts.files import atomic_write, digest, partial_file
from parts.model_folder import checksums
from parts.ranks import Ranks
from parts.run_files import sibling
from parts.run_log import Meter, StepResult, say

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

DECISIVE_FLAGS = ("batch_size", "dtype", "learning_rate", "lora_layers", "seed")


class NotSaved(OSError):
    """The last save failed."""

    def __init__(self, adapter_file: str | Path):
        super().__init__(f"the adapters of the last step could not be saved to {adapter_file}")


def run_fingerprint(rows: list[np.ndarray], params: dict, args: argparse.Namespace) -> dict:
    """Return what decides a run's result, by the name that an error gives it. A state of another
    fingerprint is not resumed from.

    rows: the token ids of the training set. params: of the model. args: with `model`, its folder.
    Raises OSError.
    """
    tokens = np.concatenate([np.append(len(row), row) for row in rows])
    flags = {f"--{name.replace('_', '-')}": getattr(args, name) for name in DECISIVE_FLAGS}
    return {
        "the training data": digest(tokens.tobytes()),
        "the model": digest(checksums(Path(args.model) / "weights.npz")),
        "params.json": params,
        **flags,
    }


def check_fingerprint(saved: dict, fingerprint: dict, path: Path) -> None:
    """Raise ValueError, which names the difference, where the state in `path` is of another run."""
    params = {**fingerprint["params.json"], **saved.get("params.json", {})}
    saved = {**saved, "params.json": params}  # an older state does not tell all
    for name, value in fingerprint.items():
        if saved.get(name, value) != value:
            was = f" ({saved.get(name)} then)" if name.startswith("--") else ""
            raise ValueError(f"{name} is not that of the run in {path}{was}; {instead_of(path)}")


def instead_of(path: Path) -> str:
    """Return what to do about a state that cannot be resumed from."""
    return f"to begin a new run from the weights alone, move {path} away"


class Snapshot(NamedTuple):
    """A run as it was when an iteration was computed to its end."""

    iteration: int
    steps: list[StepResult]  # not reported yet
    seconds: float  # that these took
    matrices: dict  # what the model trains, as a tree
    moments: dict  # the optimizer's state, as a tree


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
        self._saved = True  # the last time
        self._kept: Snapshot | None = None

    def resume(self, adapter_file: str | Path, last: int) -> None:
        """Continue the run whose state is next to this adapter file. Where there is no state, or it
        is of other adapters, say so: a new run begins.

        last: the iteration at which this run ends.
        Raises ValueError when the state is damaged, of another run, or beyond `last`.
        """
        adapter, path = Path(adapter_file), sibling(adapter_file, ".state.npz")
        content = self.ranks.read(path)
        if content is None:
            say(f"A new run begins from the weights in {adapter}: there is no {path}")
            return
        try:
            with np.load(io.BytesIO(content)) as archive:
                state = dict(archive)
            fingerprint, adapter_digest = json.loads(str(state["run"])), state["files"][0]
            self.optimizer.init({"lora": to_vector(self.model.trainable_parameters())})
            saved = self._parse(state)
        except Exception as error:  # a damaged archive raises almost anything
            raise ValueError(f"{path} is damaged ({error}); {instead_of(path)}") from error
        if digest(self.ranks.read(adapter) or b"") != adapter_digest:
            say(f"A new run begins from the weights in {adapter}: {path} is of other adapters")
            return
        check_fingerprint(fingerprint, self.fingerprint, path)
        if saved.iteration > last:
            raise ValueError(
                f"{path} is of iteration {saved.iteration}, and --iters {last} counts from the "
                "start"
            )
        self.model.update(saved.matrices)
        self.optimizer.state.update(saved.moments)
        self.meter.iteration = saved.iteration
        self.meter.steps, self.meter.seconds = saved.steps, saved.seconds
        say(f"The run goes on after iteration {saved.iteration}")

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
        )

    def save(self) -> None:
        """Save on rank 0, and wait for it. On failure, warn; training continues, and a later save
        may succeed.
        """
        failed = False
        if self.ranks.rank == 0:
            try:
                with self.ranks.saving:
                    write_run(self.adapter_file, self.snapshot(), self.fingerprint)
            except OSError as error:
                at = self.meter.iteration
                warn(f"iteration {at} could not be saved to {self.adapter_file}: {error}")
                failed = True
        self._saved = not any(self.ranks.sum_values(failed))

    def check_saved(self) -> None:
        """Raise NotSaved where the last save failed, on any rank."""
        if not self._saved:
            raise NotSaved(self.adapter_file)

    def snapshot(self) -> Snapshot:
        """Return the run as it is now, whatever later steps do to model and optimizer."""
        matrices = self.model.trainable_parameters()
        moments = tree_map(lambda value: value, self.optimizer.state)
        meter = self.meter
        return Snapshot(meter.iteration, list(meter.steps), meter.seconds, matrices, moments)

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
                f"{error}; iteration {iteration} is saved, go on with "
                f"--resume-adapter-file {self.adapter_file}"
            ) from error


def write_run(adapter_file: str | Path, snapshot: Snapshot, fingerprint: dict) -> None:
    """Write adapters and state, by the protocol above; its numbers are in the comments.

    Raises OSError, and what the device does where it has not computed the snapshot.
    """
    adapter = Path(adapter_file)
    matrices = to_numpy(snapshot.matrices)
    state = {f"adapter.{name}": value for name, value in matrices.items()}
    state |= {f"optimizer.{n}": np.array(v) for n, v in tree_flatten(snapshot.moments)}
    state |= {"iteration": np.array(snapshot.iteration), "run": np.array(json.dumps(fingerprint))}
    state["done"] = np.array(snapshot.steps, float).reshape(-1, len(StepResult._fields))
    state["seconds"] = np.array(snapshot.seconds)
    with atomic_write(adapter) as file:
        write_adapter(file, matrices)  # 1
        file.flush()
        os.fsync(file.fileno())
        files = [Path(file.name), *([adapter] if adapter.is_file() else [])]
        state["files"] = np.array([digest(path.read_bytes()) for path in files])
        with atomic_write(sibling(adapter, ".state.npz")) as state_file:
            np.savez(state_file, **state)  # 2, and 3 at the end of this block
    # 4 was the end of the outer block


def recover_interrupted_save(adapter_file: str | Path) -> None:
    """Rename adapters into the place that a kill has left to those before them, where their state
    is in its own. Raises OSError.
    """
    adapter, partial = Path(adapter_file), partial_file(adapter_file)
    if not partial.is_file():
        return
    try:
        with np.load(sibling(adapter_file, ".state.npz")) as archive:
            new, *old = archive["files"].tolist()
    except Exception:  # it is missing, or damaged, which `resume` says
        return
    untouched = not adapter.is_file() or digest(adapter.read_bytes()) in old
    if untouched and digest(partial.read_bytes()) == new:
        os.replace(partial, partial.with_suffix(""))
