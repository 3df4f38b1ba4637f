"""How many updates a run makes, and the learning rate of each: MLX's own schedulers.

An update is a step of the optimizer. With `--warmup N`, the rate of update i of the first N is
i / (N + 1) of the full one, so that none is wasted on a rate of 0. After them, a linear or cosine
schedule goes from the full rate down to what would be 0 after the last update.
"""

import argparse
import math
from collections.abc import Callable

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts.packing import Packing

import mlx.core as mx
import mlx.optimizers as optim

SCHEDULES = ("constant", "linear", "cosine")


def count_updates(args: argparse.Namespace, n_rows: int, packing: Packing | None = None) -> int:
    """Return how many updates a run makes: `--iters`, or what `--epochs` take of `n_rows` texts, or
    of how these are packed.

    An epoch is the batches of `iterate_batches`. Its last update may reach into the next one, so
    that all of it is trained on. Raises ValueError where the warmup leaves no update.
    """
    iters = args.iters
    if args.epochs is not None:
        n_batches = packing.n_batches if packing else n_rows // min(args.batch_size, n_rows)
        exact = args.epochs * n_batches / args.grad_accumulation
        iters = max(1, math.ceil(round(exact, 6)))  # 0.1 of 30 is 3, and not 4
    if args.warmup >= iters:
        raise ValueError(
            f"--warmup {args.warmup} leaves no update at the full rate, of {iters} in all: "
            "give fewer"
        )
    return iters


def learning_rate(args: argparse.Namespace) -> float | Callable[[mx.array], mx.array]:
    """Return the learning rate, or where it changes, a function of the updates made so far.

    args: with `iters`, the updates of the run.
    """
    rate, n_updates = args.learning_rate, args.iters - args.warmup
    schedule = {
        "constant": lambda step: mx.array(rate),
        "linear": optim.linear_schedule(rate, 0.0, n_updates),
        "cosine": optim.cosine_decay(rate, n_updates),
    }[args.lr_schedule]
    if args.warmup:
        warmup = optim.linear_schedule(rate / (args.warmup + 1), rate, args.warmup)
        return optim.join_schedules([warmup, schedule], [args.warmup])
    return rate if args.lr_schedule == "constant" else schedule


def make_optimizer(args: argparse.Namespace) -> optim.Optimizer:
    """Return Adam, or AdamW where weights are to decay, with the run's learning rate."""
    if args.weight_decay:
        return optim.AdamW(learning_rate(args), weight_decay=args.weight_decay)
    return optim.Adam(learning_rate(args))
