"""When the pieces of a training step run: compiled, over one batch or several, on one rank or more.

A step is `sum_rows`, which sums weighted gradients over this rank's rows of a batch, and `update`,
which makes the update of a sum. Between them stand the sums over batches and over ranks.
"""

import itertools
from collections.abc import Callable, Iterator

from parts import device  # before MLX, for its BLAS
from parts.ranks import Ranks
from parts.run_log import StepResult

import mlx.core as mx


def make_start_step(
    sum_rows: Callable[..., mx.array],
    update: Callable[[mx.array], tuple[mx.array, ...]],
    state: list,
    outputs: list,
    ranks: Ranks,
) -> Callable[..., StepResult | mx.array]:
    """Return `start_step(*batch, stopping=False, last=True)`, which does not wait for the device.

    Unless a batch is the `last` of its update, it is only added to the sum. sum_rows: takes
    `stopping`, a float32 scalar, and a batch; returns a vector. update: takes that vector, summed,
    and returns the fields of a StepResult. state: what these two read and write. outputs: what
    `update` writes besides.
    """
    held: mx.array | None = None  # the sum of the batches before
    outputs = [*state, *outputs]

    if ranks.size == 1 or ranks.sum_on_gpu:  # NCCL's sum is the GPU's own work: part of the step
        compute = device.compiled(
            lambda *batch: update(ranks.sum(sum_rows(*batch))), inputs=state, outputs=outputs
        )
        finish = device.compiled(
            lambda total: update(ranks.sum(total)), inputs=state, outputs=outputs
        )
        sum_batch = device.compiled(sum_rows, inputs=state)
    else:
        sum_batch = device.compiled(sum_rows, inputs=state)
        update = device.compiled(update, inputs=state, outputs=outputs)

        # Any other sum is waited for by the processor, between two halves: macOS ends a GPU's work
        # that waits for some seconds, as for a slower rank.
        def finish(total: mx.array) -> tuple[mx.array, ...]:
            mx.eval(total)
            total = ranks.sum(total)
            mx.eval(total)
            return update(total)

        def compute(*batch: mx.array) -> tuple[mx.array, ...]:
            return finish(sum_batch(*batch))

    def start_step(
        *batch: mx.array, stopping: bool = False, last: bool = True
    ) -> StepResult | mx.array:
        nonlocal held
        batch = mx.array(float(stopping)), *batch
        if last and held is None:
            result = StepResult(*compute(*batch))
            mx.async_eval(result, state)
            return result
        total = sum_batch(*batch) if held is None else held + sum_batch(*batch)
        mx.async_eval(total)
        if not last:
            held = total
            return total
        held = None
        result = StepResult(*finish(total))
        mx.async_eval(result, state)
        return result

    return start_step


def accumulated(
    step: Callable[..., StepResult], batches: Iterator[tuple[mx.array, ...]], n: int
) -> Callable[[bool], StepResult]:
    """Return `update(stopping)`, which makes one update with the next `n` of the batches."""

    def update(stopping: bool) -> StepResult:
        for batch in itertools.islice(batches, n - 1):
            step(*batch, last=False)
        return step(*next(batches), stopping=stopping)

    return update
