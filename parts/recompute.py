"""Cheap parts of the network computed again in the backward pass, rather than kept for it."""

from collections.abc import Callable

from parts import device  # noqa: F401  before MLX, for its BLAS

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten


def recomputed(module: nn.Module, function: Callable) -> Callable:
    """Return `function`, from an array to several, as one that keeps only its input for the
    backward pass, and is then called again; of it, only what gradients need is computed.

    module: what `function` computes with. Unlike `nn.utils.checkpoint`, the second call waits for
    the gradients that it serves, so that what it computes does not live before.
    """

    def compute(parameters: dict, x: mx.array) -> tuple[mx.array, ...]:
        module.update(parameters)
        return function(x)

    keeping_input = mx.custom_function(compute)

    @keeping_input.vjp
    def keeping_input_vjp(primals: tuple, cotangents: tuple, _: tuple) -> tuple:
        parameters, x = primals
        names = [name for name, _ in tree_flatten(parameters)]
        arrays = [array for _, array in tree_flatten(parameters)]

        def again(x: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
            return compute(tree_unflatten(list(zip(names, arrays, strict=True))), x)

        (x,) = mx.depends([x], list(cotangents))
        _, (gradient, *gradients) = mx.vjp(again, [x, *arrays], list(cotangents))
        return tree_unflatten(list(zip(names, gradients, strict=True))), gradient

    return lambda x: keeping_input(module.trainable_parameters(), x)
