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
from collections.abc import Callable

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts.ops_cpu import exp, row_max, row_sum

import mlx.core as mx

LOGITS_ON_GPU = 2**26  # logits of a block at most
LOGITS_ON_CPU = 2**20
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
