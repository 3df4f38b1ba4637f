"""What a run tells of itself: its lines and summaries, adapters.log.jsonl, adapters.png."""

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from parts import device  # before MLX, for its BLAS
from parts.adapters import describe_lora
from parts.cli import warn
from parts.files import atomic_write
from parts.packing import Packing
from parts.run_files import PLOT_TITLE, parse_entry, sibling

import mlx.core as mx
import mlx.nn as nn

MAX_SKIPPED_STEPS = 3  # in a row, whose updates are left out; then the training ends
FAR_ABOVE = 1.0  # nats a token above the loss at the start, where a training has gone wrong
N_RECENT = 10  # steps whose mean loss is compared with that
LOSSES = ("loss", "val_loss")
FIGURES = (*LOSSES, "learning_rate", "tokens_per_second")  # of an entry of the log


def say(line: str) -> None:
    """Print a line on standard output, past any progress bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def announce(
    model: nn.Module,
    train_rows: list[np.ndarray],
    n_val_texts: int,
    args: argparse.Namespace,
    n_ranks: int,
    packing: Packing | None = None,
) -> None:
    """Say what the training will do, and warn of what makes no sense together.

    train_rows: the token ids of each text. packing: of them, if they are packed.
    """
    n_tokens = sum(len(row) - 1 for row in train_rows)
    n_rows = packing.batch_rows if packing else min(args.batch_size, len(train_rows))
    n_batches = args.grad_accumulation  # of an update
    per_epoch = packing.n_batches if packing else len(train_rows) // n_rows
    steps = per_epoch / n_batches  # of an epoch, as in `iterate_batches`
    rows = f"{n_batches} x {n_rows}" if n_batches > 1 else n_rows
    dtype = str(model.norm.weight.dtype).removeprefix("mlx.core.")
    on = f", {n_ranks} ranks," if n_ranks > 1 else ""
    for bits in {m.bits for m in model.modules() if isinstance(m, nn.QuantizedLinear)}:
        dtype += f", {bits} bits a weight"
    say(
        f"On {mx.default_device().type.name}{on} in {dtype}: LoRA of "
        f"{describe_lora(model)}; {len(train_rows)} texts, {n_tokens} tokens"
        f"{packing.summary() if packing else ''}; {args.iters} iterations of {rows}, "
        f"{args.iters / steps:.2f} epochs"
    )
    if args.iters < steps:
        warn(f"{what_is_given(args)} does not finish an epoch, which has {math.ceil(steps)}")
    if n_val_texts > len(train_rows):
        warn(f"the validation set has {n_val_texts} texts, the training set {len(train_rows)}")
    if args.learning_rate > 1e-2:
        warn(f"--learning-rate {args.learning_rate} is high: 1e-5 to 1e-3 are usual for LoRA")


def what_is_given(args: argparse.Namespace) -> str:
    """Return the flag that says how long the training is, with its value."""
    return f"--iters {args.iters}" if args.epochs is None else f"--epochs {args.epochs:g}"


class StepResult(NamedTuple):
    """What a training step returns: scalars that may still be being computed."""

    loss: mx.array  # mean cross-entropy, in nats a token
    n_tokens: mx.array
    finite: mx.array  # whether loss and gradients were; if not, the step changed nothing
    stopping: mx.array  # the number of ranks that had caught a signal
    learning_rate: mx.array | float = math.nan  # which the states of older versions lack


class Report(NamedTuple):
    """The figures of the steps between two reports."""

    loss: float  # mean of the finite ones, in nats a token; NaN where none is
    n_tokens: int
    tokens_per_second: float
    learning_rates: list[float]  # of each step

    def summary(self) -> str:
        """Return what the progress bar shows."""
        return f"loss {self.loss:.3f}, {self.tokens_per_second:,.0f} tokens/s"


class Meter:
    """How far a run is, and the steps that it has not reported yet, with the seconds that count:
    those between `resume` and `pause`, without validating and saving.
    """

    def __init__(self) -> None:
        self.iteration = 0
        self.steps: list[StepResult] = []
        self.seconds = 0.0
        self.n_skipped = 0  # steps right before the last report that were not finite
        self.start_loss = math.nan  # the highest of the base model's: validation, first step
        self.warned = False  # that the loss is far above that
        self.previous: StepResult | None = None  # the step of this process before the last one
        self._last: StepResult | None = None
        self._recent: deque[float] = deque(maxlen=N_RECENT)  # losses that were finite
        self._start = 0.0

    def resume(self) -> None:
        """Start to count seconds."""
        self._start = time.perf_counter()

    def pause(self) -> None:
        """Count the seconds since `resume`."""
        self.seconds += time.perf_counter() - self._start

    def add(self, result: StepResult) -> None:
        """Add the next step, which may still be being computed."""
        self.iteration += 1
        self.steps.append(result)
        self.previous, self._last = self._last, result

    def report(self) -> Report:
        """Print the summary line of the steps not reported yet, and warn of each skipped update."""
        losses, n_tokens, finite, _, rates = np.array(self.steps, float).T
        n_steps = len(self.steps)
        for i in np.flatnonzero(finite == 0):
            at = self.iteration - n_steps + 1 + i
            warn(f"iteration {at}: the loss or a gradient is not finite; this update is left out")
        loss = losses[finite == 1].mean() if finite.any() else math.nan
        speed = n_tokens.sum() / self.seconds
        say(
            f"Iter {self.iteration}: Train loss {loss:.3f}, "
            f"It/sec {n_steps / self.seconds:.3f}, Tokens/sec {speed:.3f}"
        )
        if self.iteration == n_steps:
            self.note_start(losses[0])
        self._recent.extend(losses[finite == 1])
        if self._recent:
            self.warn_if_far_above("training", sum(self._recent) / len(self._recent))
        tail = len(list(itertools.takewhile(lambda is_finite: not is_finite, finite[::-1])))
        self.n_skipped = tail + self.n_skipped if tail == n_steps else tail
        self.steps, self.seconds = [], 0.0
        return Report(loss, int(n_tokens.sum()), speed, [shortest_float32(r) for r in rates])

    def note_start(self, loss: float) -> None:
        """Note a loss of the model before its first update, in nats a token."""
        if math.isfinite(loss) and not loss < self.start_loss:  # also where that is NaN
            self.start_loss = loss

    def warn_if_far_above(self, which: str, loss: float) -> None:
        """Warn, once in a run, of a loss far above where the run began: it has gone wrong, though
        its numbers are finite.
        """
        if self.warned or not loss > self.start_loss + FAR_ABOVE:
            return
        self.warned = True
        warn(
            f"iteration {self.iteration}: the {which} loss is {loss:.3f}, far above the "
            f"{self.start_loss:.3f} at the start: lower --learning-rate, or give --max-grad-norm 1 "
            "or --warmup 100; training goes on"
        )

    @property
    def broken(self) -> bool:
        """Whether so many steps in a row were not finite that the training has broken down."""
        return self.n_skipped >= MAX_SKIPPED_STEPS

    def check_finite(self) -> None:
        """Raise FloatingPointError where the training has broken down."""
        if self.broken:
            raise FloatingPointError(
                f"at iteration {self.iteration} the last {self.n_skipped} losses or gradients were "
                "not finite: lower --learning-rate, or give --dtype float32 if it is float16"
            )


def shortest_float32(value: float) -> float:
    """Return the number of fewest digits that is this one in float32: 0.001, not 0.00100000005."""
    return float(str(np.float32(value)))


class TrainingLog:
    """The figures of a run, next to its adapters: `adapters.log.jsonl`, one object a report or
    validation, and `adapters.png`, the curves of the losses, drawn at each validation, or at
    the end where there is none.

    entries: those of the run that this one continues. writes: whether this process writes files.
    What cannot be written is a warning: the training is worth more.
    """

    def __init__(self, adapter_file: str | Path, entries: list[dict], writes: bool = True):
        self.writes = writes
        self.file = sibling(adapter_file, ".log.jsonl")
        self.plot = sibling(adapter_file, ".png")
        self.entries = entries
        self._write(atomic_write, self.entries)

    def add(
        self,
        iteration: int,
        n_tokens: int = 0,
        learning_rates: list[float] | None = None,
        **figures: float,
    ) -> None:
        """Add a report or a validation, which draws the plot again.

        n_tokens: trained on since the last entry. learning_rates: of each step, where they differ.
        figures: any of FIGURES; one that is not finite is left out, since JSON has no NaN.
        """
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        entry = {
            "iteration": iteration,
            **{name: finite.get(name) for name in FIGURES},
            "tokens": n_tokens + (self.entries[-1]["tokens"] if self.entries else 0),
            "peak_memory_gb": device.peak_memory() / 1e9,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        if learning_rates:
            entry["learning_rates"] = learning_rates
        self.entries.append(entry)
        self._write(partial(open, mode="ab"), [entry])
        if "val_loss" in finite:
            self._draw()

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Draw the plot of a training that has validated nothing."""
        losses, validations = ([e[key] is not None for e in self.entries] for key in LOSSES)
        if kind is None and any(losses) and not any(validations):
            self._draw()

    def _draw(self) -> None:
        if not self.writes:
            return
        try:
            draw_losses(self.entries, self.plot)
        except Exception as error:  # whatever the library raises
            warn(f"{self.plot} could not be written: {error}")

    def add_report(self, iteration: int, report: Report) -> None:
        """Add a report of the steps up to this iteration."""
        rates = [rate for rate in report.learning_rates if math.isfinite(rate)]
        self.add(
            iteration,
            report.n_tokens,
            loss=report.loss,
            learning_rates=rates if len(set(rates)) > 1 else None,
            learning_rate=rates[-1] if rates else math.nan,
            tokens_per_second=report.tokens_per_second,
        )

    def validated(self, iteration: int) -> bool:
        """Whether the log holds a validation at this iteration."""
        return any(
            entry["iteration"] == iteration and entry["val_loss"] is not None
            for entry in self.entries
        )

    def _write(self, opened: Callable, entries: list[dict]) -> None:
        if not self.writes:
            return
        try:
            with opened(self.file) as file:
                file.writelines(json.dumps(entry).encode() + b"\n" for entry in entries)
        except OSError as error:
            warn(f"{self.file} could not be written: {error}")


def read_log(adapter_file: str | Path, last: int) -> list[dict]:
    """Return the log's entries up to iteration `last`; none where there is no log."""
    file = sibling(adapter_file, ".log.jsonl")
    lines = file.read_bytes().splitlines() if file.is_file() else []
    return [entry for entry in map(parse_entry, lines) if entry and entry["iteration"] <= last]


def draw_losses(entries: list[dict], path: Path) -> None:
    """Write a PNG of the losses of training and validation; one loss at least has to be among the
    entries. Raises what matplotlib does, and OSError.
    """
    os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be there
    from matplotlib.figure import Figure  # here: nothing else needs its second of loading

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel="loss, nats a token")
    for key, label, style in zip(LOSSES, ("training", "validation"), ("-", "o-"), strict=True):
        points = [(e["iteration"], e[key]) for e in entries if e[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    validations = [(e["val_loss"], e["iteration"]) for e in entries if e["val_loss"] is not None]
    if validations:
        best, at = min(validations)
        axes.plot(at, best, "*", markersize=16, label=f"best validation: {best:.3f} at {at}")
    n_tokens = max(entries[-1]["tokens"] / entries[-1]["iteration"], 1)
    upper = axes.secondary_xaxis("top", (lambda i: i * n_tokens, lambda t: t / n_tokens))
    upper.set_xlabel("tokens seen")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Title": PLOT_TITLE})


def generation_summary(n_prompt_tokens: int, times: list[float]) -> str:
    """Return how fast text was generated, and the peak memory.

    times: in seconds, of the start and of each token.
    """
    speed = ""  # one token alone has none
    if len(times) > 2:
        speed = f", {(len(times) - 2) / (times[-1] - times[1]):.3f} tokens/sec"
    return (
        f"Prompt: {n_prompt_tokens} tokens, {n_prompt_tokens / (times[1] - times[0]):.3f} "
        f"tokens/sec; generation: {len(times) - 1} tokens{speed}; "
        f"peak memory {device.peak_memory() / 1e9:.3f} GB"
    )
