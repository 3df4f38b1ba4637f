"""Dropout on the inputs of LoRA matrices (Srivastava et al., 2014), the same at each run.

A batch of a training carries a key of random numbers for each row, which depends on the seed, the
batch's number and the row alone. So nothing is left to save for a run that is resumed, masks are
the same however the rows are split among ranks and streams, and layers that are recomputed in the
backward pass draw theirs again. Without keys, as in evaluation and generation, nothing is dropped.
"""

import itertools
from collections.abc import Callable, Iterator

from parts import device  # noqa: F401  before MLX, for its BLAS

import mlx.core as mx
import mlx.nn as nn


def add_keys(
    batches: Iterator[tuple[mx.array, ...]], rate: float, seed: int, done: int
) -> Iterator[tuple[mx.array, ...]]:
    """Yield the batches, each with the keys (B, 2), uint32, of its rows; without where the rate is
    0.

    seed: below 2**32. done: the number of the first batch.
    """
    if not rate:
        yield from batches
        return
    for number, batch in zip(itertools.count(done), batches, strict=False):
        key = mx.array([seed, number % 2**32], mx.uint32)
        yield (*batch, mx.random.split(key, len(batch[0])))


def with_keys(loss_and_grad: Callable) -> Callable:
    """Return `loss_and_grad(model, inputs, targets, ...)`, which also takes the rows' keys."""

    def compute(model: nn.Module, *rows: mx.array) -> tuple:
        *batch, keys = rows if rows[-1].dtype == mx.uint32 else (*rows, None)
        if keys is None:
            return loss_and_grad(model, *batch)
        dropping = [m for m in model.modules() if "lora_a" in m]
        # A key for each row and layer: (B, layers, 2).
        keys = mx.vmap(lambda key: mx.random.split(key, len(dropping)))(keys)
        for i, layer in enumerate(dropping):
            layer._keys = keys[:, i]
        result = loss_and_grad(model, *batch)
        for layer in dropping:
            layer._keys = None
        return result

    return compute


def drop(x: mx.array, rate: float, keys: mx.array) -> mx.array:
    """x (B, ...), of which each value is 0 with the probability `rate`, else divided by 1 - rate.

    keys: (B, 2), uint32; each row's mask depends on its key alone.
    """
    kept = mx.vmap(lambda key: mx.random.bernoulli(1 - rate, x.shape[1:], key=key))(keys)
    return mx.where(kept, x * (1 / (1 - rate)), 0)
