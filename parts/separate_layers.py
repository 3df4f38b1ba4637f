"""A model's own layers as they train."""

from collections.abc import Callable
from functools import partial

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts import dropout
from parts.adapters import from_vector, to_vector
from parts.ranks import Ranks, on_each_stream

import mlx.core as mx
import mlx.nn as nn


class SeparateLayers:
    """A model's own layers as they train: the matrices of its parameters.

    `state` is what a step reads and writes besides, `outputs` what it writes.
    """

    def __init__(self, model: nn.Module, loss: Callable):
        self.model, self.loss = model, loss
        self.loss_and_grad = dropout.with_keys(nn.value_and_grad(model, loss))
        self.state, self.outputs = [model.state], []

    def value_and_grad(self, vector: mx.array, *batch: mx.array) -> tuple:
        """What `loss(model, *batch)` returns, and the gradient of its first value: a vector
        (`adapters.to_vector`), float32, as that of the matrices is, which the model has.
        """
        result, gradients = self.loss_and_grad(self.model, *batch)
        return result, to_vector(gradients)

    def on_each_stream(
        self, streams: list[mx.Stream], vector: mx.array, batch: tuple[mx.array, ...], ranks: Ranks
    ) -> list[tuple]:
        """What `value_and_grad` returns for the rows of each stream of this rank."""
        return on_each_stream(streams, partial(self.value_and_grad, vector), *batch, ranks=ranks)

    def losses(self, streams: list[mx.Stream], ranks: Ranks, *batch: mx.array) -> list[tuple]:
        """What the loss returns for the rows of each stream of this rank."""
        return on_each_stream(streams, partial(self.loss, self.model), *batch, ranks=ranks)

    def put(self, vector: mx.array) -> None:
        """Put the numbers of a vector in the place of the model's matrices."""
        self.model.update(from_vector(vector, self.model.trainable_parameters()))

    def prepare(self, *batch: mx.array) -> tuple[mx.array, ...]:
        """The batch in the shape that a step is to have."""
        return batch

    def finish_step(self) -> None:
        """Do what is left to do outside of a compiled step."""
