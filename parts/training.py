"""What a training does around its steps: start, find what is due, validate."""

import argparse
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts.adapters import warn_of_flags
from parts.fingerprint import run_fingerprint
from parts.interrupts import Interrupts
from parts.ranks import Ranks
from parts.run_log import Meter, TrainingLog, read_log, say
from parts.save_and_resume import RunState

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
        if not state.meter.iteration:
            warn_of_flags(model, args)
    done = state.meter.iteration
    entries = read_log(args.resume_adapter_file, done) if done else []
    if state.best.last < done:  # a validation that a kill has parted from its save is made again
        entries = [e for i, e in enumerate(entries) if not (i and is_validation(e, done))]
    log = TrainingLog(args.adapter_file, entries, writes=ranks.rank == 0)
    model.train()
    model.grad_checkpoint = args.grad_checkpoint
    mx.reset_peak_memory()
    if done == args.iters:  # nothing is left to train: write what was asked for
        state.save()
    return state, log


def is_validation(entry: dict, iteration: int) -> bool:
    """Whether an entry of the log is of a validation at this iteration."""
    return entry["iteration"] == iteration and entry["val_loss"] is not None


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


def report_steps(state: RunState, log: TrainingLog, bar: tqdm) -> None:
    """Report and log the steps since the last report."""
    report = state.meter.report()
    log.add_report(state.meter.iteration, report)
    bar.set_postfix_str(report.summary())


def validate_at_start(
    validate: Callable[[], bool], state: RunState, log: TrainingLog, args: argparse.Namespace
) -> bool:
    """Validate the base model before the first update, or make up for a validation that a signal or
    a kill broke off. Return whether the training ends here, since patience has.
    """
    done, ranks = state.meter.iteration, state.ranks
    made = state.best.last >= done and any(is_validation(e, done) for e in log.entries)
    owed = not done or (what_is_due(done, args).validate and not made)
    if any(ranks.sum_values(owed and ranks.rank == 0)):  # which alone has read the log
        gives_up = validate()
    else:
        gives_up = is_out_of_patience(state, args.patience)
    if gives_up or state.has_new_best:
        state.save()
    return gives_up


def report_validation(
    compute: Callable[[], float | None],
    state: RunState,
    log: TrainingLog,
    interrupts: Interrupts,
    patience: int | None,
    bar: tqdm,
) -> bool:
    """Report and log the validation loss that `compute` returns, and compare it with the best.
    Where it returns None, since a rank has caught a signal, all stop. Return whether patience ends
    the training; if so, report its last steps.
    """
    start, done = time.perf_counter(), state.meter.iteration
    value = compute()
    if value is None:
        interrupts.stopping = True
        return False
    iteration = max(done, 1)  # the first is of the base model, before the first update
    say(f"Iter {iteration}: Val loss {value:.3f}, Val took {time.perf_counter() - start:.3f}s")
    if done:
        state.meter.warn_if_far_above("validation", value)
    else:
        state.meter.note_start(value)
    if math.isfinite(value):
        log.add(iteration, val_loss=value)
    state.compare(done, value)
    state.ranks.sum_values(0)  # the others wait here, and not in a step, for rank 0, which draws
    gives_up = is_out_of_patience(state, patience)
    if gives_up and state.meter.steps:
        report_steps(state, log, bar)
    return gives_up


def is_out_of_patience(state: RunState, patience: int | None) -> bool:
    """Whether so many validations were no better than the best before that the training ends. If
    so, say it.
    """
    best = state.best
    if patience is None or best.n_worse < patience:
        return False
    since = f"that at iteration {best.iteration}" if best.iteration else "the base model's"
    say(
        f"Iter {state.meter.iteration}: no validation loss below {since} in {best.n_worse} "
        "validations: the training ends, see --patience"
    )
    return True
