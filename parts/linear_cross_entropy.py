"""The cross-entropy of an output projection, without ever holding all of its logits.

With 128,000 tokens the logits of a batch and their gradient are the largest arrays of a training
step. Here a block of them is computed, and used at once for the losses and for the gradient of the
projection's input; then the next block takes its place (the idea: Wijmans et al., "Cut Your Losses
in Large-Vocabulary Language Models", 2024). Each loss depends on one row of the input, so that the
gradient is computed in the forward pass, for a cotangent of one, and scaled in the backward pass.
The weight is frozen: it has no gradient.

A GPU takes blocks of positions. A CPU takes blocks of the vocabulary, and corrects what it has
summed when a larger logit is found (Milakov and Gimelshein, "Online Normalizer Calculation for
Softmax", 2018): so it reads the weight once, and the block stays in its cache.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from parts import device  # before MLX, for its BLAS
from parts.ops_cpu import exp, row_max, row_sum
from parts.sgemm import as_numpy, in_type_of, multiply, to_float32

import mlx.core as mx

LOGITS_ON_GPU = 2**26  # logits of a block at most
LOGITS_ON_CPU = 2**20
LOGITS_IN_NUMPY = 2**18
MULTIPLE = 128  # of the positions or tokens of a block, which products and `row_max` want


def with_gradient(compute: Callable, x: mx.array, weight: mx.array, targets: mx.array) -> mx.array:
    """The losses (N,) that `compute` returns for rows x (N, D), with their gradient of x."""

    @mx.custom_function
    def losses_and_gradient(x: mx.array) -> tuple[mx.array, mx.array]:
        return compute(x, weight, targets, training=True)

    @losses_and_gradient.vjp
    def losses_and_gradient_vjp(
        x: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
    ) -> mx.array:
        (cotangent, _), (_, gradient) = cotangents, outputs
        return (gradient * cotangent[:, None]).astype(x.dtype)

    return losses_and_gradient(x)[0]


def by_positions(
    x: mx.array, weight: mx.array, targets: mx.array, training: bool
) -> tuple[mx.array, mx.array | None]:
    """The losses (N,) in float32, and in `training` the gradient of x, in its dtype (N, D).

    x: (N, D); weight: (V, D); targets: (N,), negative where a position does not count.
    """
    size = max(1, LOGITS_ON_GPU // len(weight))
    size = -(-size // MULTIPLE) * MULTIPLE
    losses, gradients = [], []
    for start in range(0, len(x), size):
        rows, block = x[start : start + size], targets[start : start + size]
        if losses:  # one block after the other
            (rows,) = mx.depends([rows], losses[-1:] + gradients[-1:])
        logits, counts = rows @ weight.T, (block >= 0).astype(mx.float32)
        compute = lambda logits, block=block: mx.fast.cross_entropy(logits, mx.maximum(block, 0))  # noqa: E731
        if training:
            (block_losses,), (gradient,) = mx.vjp(compute, [logits], [counts])
            gradients.append(gradient @ weight)
        else:
            block_losses = compute(logits)
        losses.append(block_losses * counts)
    return mx.concatenate(losses), mx.concatenate(gradients) if training else None


def by_vocabulary(
    x: mx.array, weight: mx.array, targets: mx.array, training: bool
) -> tuple[mx.array, mx.array | None]:
    """See `by_positions`. The gradient is in float32."""
    size = max(1, LOGITS_ON_CPU // max(1, len(x)))
    size = -(-size // MULTIPLE) * MULTIPLE
    max_logit, sums = mx.full((len(x), 1), -math.inf), []  # (N, 1); (N, 1) and (N, D)
    for start in range(0, len(weight), size):
        block = weight[start : start + size]
        logits = (x @ block.T).astype(mx.float32)
        last_max, max_logit = max_logit, mx.maximum(max_logit, row_max(logits))
        exps = exp(logits - max_logit)
        terms = [row_sum(exps)]
        if training:  # what the softmax makes of the weight's rows
            terms.append((exps.astype(x.dtype) @ block).astype(mx.float32))
        if sums:
            scale = exp(last_max - max_logit)
            terms = [term + scale * total for term, total in zip(terms, sums, strict=True)]
        sums = terms
        (x,) = mx.depends([x], sums)  # one block after the other
    counts = targets[:, None] >= 0
    at_target = weight[mx.maximum(targets, 0)].astype(mx.float32)  # (N, D)
    losses = mx.log(sums[0]) + max_logit - row_sum(x.astype(mx.float32) * at_target)
    losses = mx.where(counts, losses, 0).squeeze(-1)
    return losses, mx.where(counts, sums[1] / sums[0] - at_target, 0) if training else None


# -------------------------------------------------------------------------------------------------
# In NumPy

THREADS = ContextVar("threads", default=None)  # that compute a cross-entropy at once


@contextmanager
def at_once(threads: Executor) -> Iterator[None]:
    """Meanwhile, a cross-entropy is computed in NumPy, when it is called."""
    token = THREADS.set(threads)
    try:
        yield
    finally:
        THREADS.reset(token)


def in_numpy(
    x: mx.array, weight: mx.array, targets: mx.array, training: bool
) -> tuple[mx.array, mx.array | None]:
    """See `by_positions`. Waits for x, in float32, and splits the rows among `THREADS`."""
    x, weight, targets = map(as_numpy, (x, weight, targets))
    losses, gradients = np.zeros(len(x), np.float32), np.zeros_like(x) if training else None

    def compute(rows: np.ndarray) -> None:
        losses[rows], gradient = loss_and_gradient(x[rows], weight, targets[rows], training)
        if training:
            gradients[rows] = gradient

    shares = np.array_split(np.flatnonzero(targets >= 0), len(device.available_cores()))
    list(THREADS.get().map(compute, (rows for rows in shares if len(rows))))
    return mx.array(losses), mx.array(gradients) if training else None


@np.errstate(all="ignore")  # what is not finite shows in the loss
def loss_and_gradient(
    x: np.ndarray, weight: np.ndarray, targets: np.ndarray, training: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """The losses (N,) and in `training` the gradients of x (N, D); all targets (N,) count."""
    n_rows, cast = len(x), in_type_of(weight, x)
    size = max(1, LOGITS_IN_NUMPY // n_rows)
    buffer = np.empty((n_rows, size), np.float32)
    max_logit = np.full((n_rows, 1), -np.inf, np.float32)
    total = np.zeros((n_rows, 1), np.float32)
    mean = np.zeros_like(x)  # of the weight's rows, as the softmax weighs them, times `total`
    for start in range(0, len(weight), size):
        block = weight[start : start + size]
        logits = multiply(cast, block.T, buffer[:, : len(block)])
        last_max, max_logit = max_logit, np.maximum(max_logit, logits.max(1, keepdims=True))
        logits -= max_logit
        exps, scale = np.exp(logits, out=logits), np.exp(last_max - max_logit)
        total = total * scale + exps.sum(1, keepdims=True)
        if training:
            mean *= scale
            multiply(in_type_of(weight, exps), block, mean, add=True)
    at_target = to_float32(weight[targets])
    losses = np.log(total[:, 0]) + max_logit[:, 0] - np.einsum("nd,nd->n", x, at_target)
    return losses, mean / total - at_target if training else None
