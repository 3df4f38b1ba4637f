"""What a training does around its steps: start, find what is due, validate."""

import argparse
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts.interrupts import Interrupts
from parts.ranks import Ranks
from parts.run_log import Meter, TrainingLog, read_log, say
from parts.save_and_resume import RunState, run_fingerprint

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim


def start_run(
    model: nn.Module,
    train_rows: list[np.ndarray],
    optimizer: optim.Optimizer,
    args: argparse.Namespace,
    ranks: Ranks,
) -> tuple[RunState, TrainingLog]:
    """Return the state and the log of a new run, or of the one that `args` resumes, which is put
    into model and optimizer. Prepare the model for training.

    train_rows: the token ids of each text. Raises what `RunState.resume` does.
    """
    fingerprint = run_fingerprint(train_rows, vars(model.args), args)
    state = RunState(model, optimizer, Meter(), fingerprint, args.adapter_file, ranks)
    if args.resume_adapter_file is not None:
        state.resume(args.resume_adapter_file, args.iters)
    done = state.meter.iteration
    entries = read_log(args.resume_adapter_file, done) if done else []
    log = TrainingLog(args.adapter_file, entries, writes=ranks.rank == 0)
    model.train()
    model.grad_checkpoint = args.grad_checkpoint
    mx.reset_peak_memory()
    if done == args.iters:  # nothing is left to train: write what was asked for
        state.save()
    return state, log


class Due(NamedTuple):
    """What is to be done after a step."""

    report: bool
    validate: bool
    save: bool


def what_is_due(iteration: int, args: argparse.Namespace, stopping: bool = False) -> Due:
    """Return what is to be done after this iteration, which is the last if the run is `stopping`.

    The last is reported and saved. It is validated where all iterations are done.
    """
    last = iteration == args.iters or stopping
    return Due(
        report=iteration % args.steps_per_report == 0 or last,
        validate=iteration % args.steps_per_eval == 0 or iteration == args.iters > 1,
        save=iteration % args.save_every == 0 or last,
    )


def report_validation(
    compute: Callable[[], float | None],
    log: TrainingLog,
    interrupts: Interrupts,
    ranks: Ranks,
    iteration: int,
) -> None:
    """Report and log the validation loss that `compute` returns. Where it returns None, since a
    rank has caught a signal, all stop.
    """
    start = time.perf_counter()
    value = compute()
    if value is None:
        interrupts.stopping = True
        return
    say(f"Iter {iteration}: Val loss {value:.3f}, Val took {time.perf_counter() - start:.3f}s")
    if math.isfinite(value):
        log.add(iteration, val_loss=value)
    ranks.sum_values(0)  # the others wait here, and not in a step, for rank 0, which draws
