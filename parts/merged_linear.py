"""Linear layers with the same input as one product, for one token at a time."""

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np

from parts import device, ops  # before MLX, for its BLAS

import mlx.core as mx
import mlx.nn as nn

# On a CPU, MLX's own product with quantized weights keeps one core busy and no more.
MAX_CORES = 4
MIN_BYTES_TO_SPLIT = 2**18  # of weights; for fewer, waiting costs more than further cores gain


def base_linear(layer: nn.Module) -> nn.Module:
    """The linear layer without its LoRA matrices."""
    return layer.linear if "lora_a" in layer else layer


def stack_lora(layers: tuple[nn.Module, ...], ends: list[int]) -> list[mx.array]:
    """The LoRA pairs of layers with the same input as one pair: (D, sum of ranks), and block by
    block (sum of ranks, all outputs), the latter times each layer's scale.

    `ends` is where each layer's outputs end. Returns an empty list where no layer is adapted.
    """
    pairs = []
    for layer, start, end in zip(layers, [0, *ends], ends, strict=False):
        if "lora_a" in layer:
            others = (0, 0), (start, ends[-1] - end)  # the outputs of the other layers
            pairs.append((layer.lora_a, mx.pad(layer.lora_b * layer.scale, others)))
    if not pairs:
        return []
    inputs, outputs = zip(*pairs, strict=True)
    return [mx.concatenate(inputs, axis=1), mx.concatenate(outputs)]


class MergedLinear:
    """Linear layers applied to one vector, outputs concatenated: (1, 1, D) to (1, 1, all outputs).

    For a GPU their weights become parts of one matrix, so that they take no memory twice. LoRA
    matrices are stacked into one pair, in the dtype of the weights.
    """

    def __init__(self, *layers: nn.Module):
        linears = [base_linear(layer) for layer in layers]
        ends = np.cumsum([len(linear.weight) for linear in linears]).tolist()
        if len(linears) == 1 or device.ON_CPU:  # there another product costs less than a copy
            self.weights = separate_weights(linears)
        else:
            self.weights = merge_weights(linears, ends)
        self.multiply = product_of(linears[0])
        dtype = self.weights[0][-1].dtype
        self.lora = [matrix.astype(dtype) for matrix in stack_lora(layers, ends)]
        self.bias = stack_biases(linears)
        mx.eval(self.lora, self.bias)

    def __call__(self, x: mx.array) -> mx.array:
        products = [self.multiply(x, *weights) for weights in self.weights]
        y = mx.concatenate(products, axis=-1)
        if self.bias is not None:
            y = y + self.bias
        if self.lora:
            inputs, outputs = self.lora
            y = mx.addmm(y, x @ inputs, outputs)
        return y


def stack_biases(linears: list[nn.Module]) -> mx.array | None:
    """The biases of all outputs; None where no layer has one."""
    dtypes = [linear.bias.dtype for linear in linears if "bias" in linear]
    if not dtypes:
        return None
    blank = [mx.zeros(len(linear.weight), dtypes[0]) for linear in linears]
    return mx.concatenate([m.get("bias", zeros) for m, zeros in zip(linears, blank, strict=True)])


def weight_names(linear: nn.Module) -> list[str]:
    """`weight`, and for a quantized layer `scales` and `biases` after it; never `bias`."""
    return [name for name in linear.parameters() if name != "bias"]


def separate_weights(linears: list[nn.Module]) -> list[list[mx.array]]:
    """The weights of each layer, quantized ones with scales and biases."""
    return [[linear[name] for name in weight_names(linear)] for linear in linears]


def merge_weights(linears: list[nn.Module], ends: list[int]) -> list[list[mx.array]]:
    """Concatenate the weights of layers, and make the layers' own views of the result. Layers that
    have been merged before, and still have those views, share it.
    """
    merged, views = getattr(linears[0], "merged", ([], []))
    if views and all(map(same_arrays, separate_weights(linears), views)):
        return [merged]
    merged = [mx.concatenate(arrays) for arrays in zip(*separate_weights(linears), strict=True)]
    views = list(zip(*(mx.split(whole, ends[:-1]) for whole in merged), strict=True))
    for linear, arrays in zip(linears, views, strict=True):
        for name, view in zip(weight_names(linear), arrays, strict=True):
            linear[name] = view
    object.__setattr__(linears[0], "merged", (merged, views))  # it is no parameter
    mx.eval(merged)
    mx.clear_cache()  # of what the merged weights have replaced
    return [merged]


def same_arrays(some: list[mx.array], others: list[mx.array]) -> bool:
    """Whether both hold the same arrays, and not only equal ones."""
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def product_of(linear: nn.Module) -> Callable:
    """A function that multiplies a vector with weights such as those of `linear`."""
    if isinstance(linear, nn.QuantizedLinear):
        return partial(multiply_quantized, group_size=linear.group_size, bits=linear.bits)
    return lambda x, weight: x @ weight.T


@lru_cache
def core_streams() -> list[mx.Stream]:
    """A stream for each core, up to `MAX_CORES`."""
    return [mx.new_stream(mx.cpu) for _ in device.available_cores()[:MAX_CORES]]


def multiply_quantized(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """A vector (1, 1, K) times the transpose of N quantized rows: (1, 1, N). On a CPU the rows are
    split among the cores. Of more vectors (B, 1, K) it is the product that the network has.
    """
    if len(x) > 1:
        return ops.quantized_matmul(x, weight, scales, biases, group_size, bits, training=False)
    multiply = partial(mx.quantized_matmul, x, group_size=group_size, bits=bits)
    if not device.ON_CPU or weight.nbytes < MIN_BYTES_TO_SPLIT:
        return multiply(weight, scales, biases)
    streams, n_rows, products = core_streams(), len(weight), []
    n_each = -(-n_rows // len(streams))
    for stream, start in zip(streams, range(0, n_rows, n_each), strict=False):
        rows = slice(start, start + n_each)
        with mx.stream(stream):
            products.append(multiply(weight[rows], scales[rows], biases[rows]))
    return mx.concatenate(products, axis=-1)
