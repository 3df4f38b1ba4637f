"""Linear layers with the same input as one product, in training, and their LoRA matrices as one
pair.

Shapes: N positions of all rows of a batch, D inputs, O outputs of all layers, R ranks of a pair.
"""

import numpy as np

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts import ops_cuda
from parts.merged_linear import base_linear, merge_weights, separate_weights, stack_biases

import mlx.core as mx
import mlx.nn as nn

# A layer with a smaller input (numbers) waits for the processor, a larger one for the GPU.
MIN_SIZE_OF_WORK = 2**21


def waits_for_launches(size: int) -> bool:
    """Whether operations on so many numbers are so small that launching them takes longer. Then
    memory is no matter, and what gradients need is kept, rather than computed again.
    """
    return size < MIN_SIZE_OF_WORK


class JoinedLinear(nn.Module):
    """Linear layers with the same input as one product: (N, D) to all outputs (N, O).

    While it trains, it has a pair of LoRA matrices: `lora_a`, transposed (R, D), and `lora_b`
    (R, O), times the scale, and 0 where an output is another layer's. Layers that are not adapted
    have none.
    """

    def __init__(self, *layers: nn.Module):
        super().__init__()
        linears = [base_linear(layer) for layer in layers]
        self._layers = layers
        self._ends = np.cumsum([len(linear.weight) for linear in linears]).tolist()
        merge = merge_weights if len(linears) > 1 else lambda *_: separate_weights(linears)
        (self._weights,) = merge(linears, self._ends)
        self._bias = stack_biases(linears)
        self._settings = None  # of quantized weights
        if isinstance(linears[0], nn.QuantizedLinear):
            self._settings = {"group_size": linears[0].group_size, "bits": linears[0].bits}
        else:
            self._transposed = self._weights[0].T
            mx.eval(self._transposed)  # a view, which no step has to make again

    def pair(self) -> list[mx.array]:
        """The LoRA matrices, or none."""
        return [self.lora_a, self.lora_b] if "lora_a" in self else []

    def weight(self, transposed: bool = False) -> mx.array:
        """The weights (O, D); or `transposed`, (D, O)."""
        if self._settings:
            weight = mx.dequantize(*self._weights, **self._settings)
            return weight.T if transposed else weight
        return self._transposed if transposed else self._weights[0]

    def product(
        self, x: mx.array, pair: list[mx.array], residual: mx.array | None = None
    ) -> tuple[mx.array, list[mx.array]]:
        """The outputs, plus `residual`. For `gradients` in a list: x A (N, R), if there is a
        pair.
        """
        addend = self._bias if residual is None else residual
        weight = self.weight(transposed=True)
        y = x @ weight if addend is None else mx.addmm(addend, x, weight)
        if not pair:
            return y, []
        if waits_for_launches(x.size):
            inner = ops_cuda.lora_inner(x, pair[0])
            return ops_cuda.lora_add(y, inner, pair[1]), [inner]
        inner = x @ pair[0].T
        return mx.addmm(y, inner, pair[1]), [inner]

    def gradients(
        self, x: mx.array | None, inner: list[mx.array], cotangent: mx.array, pair: list[mx.array]
    ) -> tuple[mx.array, list[mx.array]]:
        """The gradients of x and of the pair. x is None where there is none."""
        gradient = cotangent @ self.weight()
        if not pair:
            return gradient, []
        if waits_for_launches(x.size):
            of_inner = ops_cuda.lora_inner(cotangent, pair[1])
            of_pair = ops_cuda.lora_gradients(x, of_inner, cotangent, *inner)
            return ops_cuda.lora_add(gradient, of_inner, pair[0]), of_pair
        of_inner = cotangent @ pair[1].T
        of_pair = [of_inner.T @ x, inner[0].T @ cotangent]
        return mx.addmm(gradient, of_inner, pair[0]), of_pair

    def pair_positions(self, positions: dict[int, dict[str, np.ndarray]]) -> list[tuple]:
        """Of each matrix of the pair: its name, which number of a vector each of its numbers is, -1
        where it is 0, and the factor of that.

        positions: of the numbers of each layer's matrices in the vector, by the layer's `id`.
        """
        columns, rows, factors = [], [], []
        for layer, start, end in zip(self._layers, [0, *self._ends], self._ends, strict=False):
            if id(layer) in positions:
                a, b = (positions[id(layer)][name] for name in ("lora_a", "lora_b"))
                others = (0, 0), (start, self._ends[-1] - end)
                columns.append(a)
                rows.append(np.pad(b, others, constant_values=-1))
                factors.append(np.pad(np.full(b.shape, layer.scale), others))
        if not columns:
            return []
        a, b = np.concatenate(columns, 1).T, np.concatenate(rows)
        return [("lora_a", a, np.ones(a.shape)), ("lora_b", b, np.concatenate(factors))]
