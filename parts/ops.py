"""The operations of the network, each in the form that the device computes fastest.

The one door: a caller names the operation, and here it is decided whether a CPU's form (ops_cpu), a
kernel of CUDA (ops_cuda) or MLX's own computes it. All forms agree, and have gradients.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from parts import device, ops_cpu, ops_cuda, quantized_cuda, recompute
from parts.linear_cross_entropy import (
    THREADS,
    by_positions,
    by_vocabulary,
    in_numpy,
    with_gradient,
)
from parts.rope import Rope, amplitude, wavelength_table

import mlx.core as mx
import mlx.nn as nn


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up`, in their shape and dtype (Shazeer, "GLU Variants Improve Transformer",
    2020).
    """
    return ops_cpu.swiglu(gate, up) if device.ON_CPU else swiglu_on_gpu(gate, up)


# To a GPU an exponential costs less than to store and fetch it: the gradient computes it again.
@mx.custom_function
def swiglu_on_gpu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up`."""
    return gate / (1 + mx.exp(-gate)) * up


@swiglu_on_gpu.vjp
def swiglu_on_gpu_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    """The gradients of gate and up."""
    gate, up = primals
    if ops_cuda.has_kernels(gate):
        return ops_cuda.swiglu_gradients(gate, up, cotangent)
    # `mx.compile` would store what two of its kernels share, so each gradient, and the forward
    # pass, has an expression of its own.
    x = gate.astype(mx.float32)
    sigmoid = 1 / (1 + mx.exp(-x))
    gradient = cotangent * up * (sigmoid + x * sigmoid * (1 - sigmoid))
    return gradient.astype(gate.dtype), cotangent * nn.silu(gate)


def recomputed(module: nn.Module, function: Callable) -> Callable:
    """See `recompute.recomputed`. A CPU keeps all: it has memory, and no time to spare."""
    return function if device.ON_CPU else recompute.recomputed(module, function)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Minus the log-probability, in nats and float32, of each target; 0 for negative targets.

    logits: (..., V); targets: (...) integer. Returns (...).
    """
    losses = mx.fast.cross_entropy(logits.astype(mx.float32), mx.maximum(targets, 0))
    return mx.where(targets >= 0, losses, 0)


def linear_cross_entropy(
    x: mx.array, weight: mx.array, targets: mx.array, training: bool = True
) -> mx.array:
    """`cross_entropy(x @ weight.T, targets)`, in blocks: the logits never live whole.

    x: (..., D); weight: (V, D), frozen; targets: (...) int32, negative where a position does not
    count. Returns (...) in float32. In `training`, the gradient of x is computed at once.
    """
    compute = by_vocabulary if device.ON_CPU else by_positions
    compute = in_numpy if THREADS.get() else compute
    rows = x.reshape(-1, x.shape[-1]), weight, targets.flatten()
    losses = with_gradient(compute, *rows) if training else compute(*rows, training)[0]
    return losses.reshape(targets.shape)


class PackedRows(NamedTuple):
    """Rows that hold several texts, none of which sees another."""

    positions: mx.array  # (B, L), of each token in its text
    masks: mx.array | list[ops_cpu.BlockMask]  # of a GPU (B, 1, L, L), to add to the scores


def packed_rows(
    positions: mx.array, n_shared: int, window: int | None, dtype: mx.Dtype
) -> PackedRows:
    """Prepare what all layers have in common.

    positions: (B, L) int32. n_shared: heads that share a key head. window: see `attention`. dtype:
    of the queries.
    """
    if device.ON_CPU:
        return PackedRows(positions, ops_cpu.packed_masks(positions, n_shared, window, dtype))
    length = positions.shape[1]
    ages = mx.arange(length)[:, None] - mx.arange(length)  # of keys, in positions before a query
    seen = (ages >= 0) & (ages <= mx.minimum(positions, (window or length) - 1)[..., None])
    return PackedRows(positions, mx.where(seen, 0, mx.finfo(dtype).min).astype(dtype)[:, None])


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    window: int | None = None,
    packed: PackedRows | None = None,
) -> mx.array:
    """Scaled dot-product attention. The last query sees all keys, each earlier one a key fewer;
    with a `window`, only so many of the last keys that it would see; in `packed` rows, of these
    the keys of its text.

    queries: (B, H, L, head_dim); keys and values: (B, K, S, head_dim). Returns the queries' shape.
    """
    if packed is not None:
        if device.ON_CPU:
            return ops_cpu.packed_attention(queries, keys, values, scale, packed.masks)
        mask = packed.masks
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    if window is not None:  # drop the keys that no query sees
        n_seen = queries.shape[2] + window - 1
        keys, values = keys[:, :, -n_seen:], values[:, :, -n_seen:]
    length, n_keys = queries.shape[2], keys.shape[2]
    if device.ON_CPU:
        return ops_cpu.attention(queries, keys, values, scale, window)
    mask = "causal" if length > 1 else None
    if mask and window is not None and window < n_keys:
        mask = window_mask(length, n_keys, window)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


@lru_cache(maxsize=4)  # what the layers have in common
def window_mask(length: int, n_keys: int, window: int) -> mx.array:
    """Which keys (length, n_keys) each of the last `length` positions sees: the `window` last up to
    its own.
    """
    ages = np.arange(n_keys - length, n_keys)[:, None] - np.arange(n_keys)
    return mx.array((ages >= 0) & (ages < window))


def rope(x: mx.array, offset: int | mx.array, rope: Rope, training: bool = False) -> mx.array:
    """Rotate each pair of neighbouring channels by an angle that grows with the position.

    x: (B, L, heads, head_dim), the positions from `offset` on, which for one position may be an
    array; or where `offset` is (B, L), these positions. Returns the same shape. In `training`,
    CUDA has a kernel for it and for its gradient.
    """
    batch, length, heads, head_dim = x.shape
    if device.ON_CPU:
        return ops_cpu.rope(x, offset, rope)
    if training and ops_cuda.has_kernels(x):
        return ops_cuda.rope(x, offset, rope)
    factor = amplitude(rope)
    if factor != 1:
        x = x * factor
    if length > 1:  # one for each row: MLX then takes x as it lies
        if not isinstance(offset, mx.array):
            offset = positions(offset, length, batch)
        offset = offset.flatten()
    options = {"traditional": True, "base": rope.theta, "scale": 1.0, "offset": offset}
    if rope.scaling:
        options.update(base=None, freqs=wavelength_table(rope))
    return mx.fast.rope(x.reshape(-1, heads, 1, head_dim), head_dim, **options).reshape(x.shape)


@lru_cache(maxsize=4)  # what the layers have in common
def positions(offset: int, length: int, batch: int) -> mx.array:
    """`length` positions from `offset` on, for each row of a batch: (batch * length) int32."""
    return mx.array(np.tile(np.arange(offset, offset + length, dtype=np.int32), batch))


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x (..., D) divided by its root mean square, times weight (D) (Zhang and Sennrich, 2019)."""
    return mx.fast.rms_norm(x, weight, eps)


def rms_norm_residual(
    x: mx.array, weight: mx.array, eps: float, training: bool
) -> tuple[mx.array, mx.array]:
    """x (..., D), and x normalised. In `training`, CUDA adds both gradients of x in one kernel, and
    computes none of the weight.
    """
    if training and x.dtype == weight.dtype and ops_cuda.has_kernels(x):
        return ops_cuda.rms_norm_residual(x, weight, eps)
    return x, rms_norm(x, weight, eps)


def quantized_matmul(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int,
    bits: int,
    training: bool = True,
) -> mx.array:
    """x (..., K) times the transpose of N quantized rows: (..., N).

    Many rows of x are multiplied with dequantized weights where that beats MLX's own product: on a
    CPU and with CUDA. In `training` they are not kept for the backward pass, but dequantized again.
    """
    weights, settings = (weight, scales, biases), {"group_size": group_size, "bits": bits}
    n_rows = x.size // x.shape[-1]
    if device.has_cuda() and not training:
        product = quantized_cuda.multiply(x, *weights, **settings)
        if product is not None:
            return product
    if n_rows <= most_rows_of_mlx():
        return mx.quantized_matmul(x, *weights, transpose=True, **settings)

    def product(x: mx.array) -> mx.array:
        return x @ dequantize(*weights, **settings).T

    if not training:
        return product(x)
    product = mx.custom_function(product)

    @product.vjp
    def product_vjp(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
        return cotangent @ dequantize(*weights, **settings)

    return product(x)


def dequantize(
    weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """Quantized rows as they are in the dtype of their scales."""
    compute = quantized_cuda.dequantize if device.has_cuda() else mx.dequantize
    return compute(weight, scales, biases, group_size=group_size, bits=bits)


def sort(x: mx.array) -> mx.array:
    """x, float32, in ascending order along its last axis.

    NumPy's sort takes a thirtieth of the time of MLX's on a CPU, but waits until x is computed.
    """
    return mx.array(np.sort(np.array(x), axis=-1)) if sort_waits() else mx.sort(x, axis=-1)


def sort_waits() -> bool:
    """Whether `sort` waits until its argument is computed."""
    return device.ON_CPU


def most_rows_of_mlx() -> float:
    """The rows up to which MLX's product with quantized weights is the fastest."""
    if device.ON_CPU:
        return 2
    return 16 if device.has_cuda() else math.inf
