"""The layers of decoder_batch on a CPU, as few operations of MLX: to queue one costs a core more
than many of them take for so few rows.
"""

import math
from collections.abc import Callable

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts import ops_cpu
from parts.merged_linear import base_linear
from parts.rope import Rope, cos_sin, rotate_half_matrix

import mlx.core as mx
import mlx.nn as nn


def cpu_layers(model: nn.Module) -> Callable:
    """A function `run(x, position, columns, mask, caches)` that returns what the layers make of x
    (B, 1, D), and writes its keys and values into the last of the caches' `columns`, a slice.

    mask: what to add to the scores (B, 1, 1, columns) of the rows, or None.
    """
    layers = [prepare_layer(layer) for layer in model.layers]
    rope = model.args.rope

    def run(
        x: mx.array, position: int, columns: slice, mask: mx.array | None, caches: list
    ) -> mx.array:
        x, rotation = x[:, 0], rotation_matrix(position, rope, x.dtype)
        rotations = rotation * model.args.head_dim**-0.5, rotation  # queries are scaled, too
        for run_layer, cache in zip(layers, caches, strict=True):
            x = run_layer(x, rotations, columns, mask, cache)
        return x[:, None]

    return run


def rotation_matrix(position: int, rope: Rope, dtype: mx.Dtype) -> mx.array:
    """The matrix (head_dim, head_dim) that rotates the channels of a head at this position."""
    cosines, sines = (table[0].astype(dtype) for table in cos_sin(position, 1, rope))
    half = rotate_half_matrix(rope.head_dim, dtype)
    return mx.eye(rope.head_dim, dtype=dtype) * cosines + half * sines


def prepare_layer(layer: nn.Module) -> Callable:
    """What a layer makes of x (B, D); see `cpu_layers`."""
    attention, feed_forward = layer.attention, layer.feed_forward
    n_kv_heads, head_dim = attention.n_kv_heads, attention.head_dim
    wq, wk, wv, wo = (product_of_rows(attention[name]) for name in ("wq", "wk", "wv", "wo"))
    w1, w2, w3 = (product_of_rows(feed_forward[name]) for name in ("w1", "w2", "w3"))

    def run_layer(
        x: mx.array,
        rotations: tuple[mx.array, mx.array],
        columns: slice,
        mask: mx.array | None,
        cache: list[mx.array],
    ) -> mx.array:
        # Queries (B, K, H / K, head_dim), keys and values (B, K, 1, head_dim).
        normed = layer.attention_norm(x)
        queries, keys, values = (
            product(normed).reshape(len(x), n_kv_heads, -1, head_dim) for product in (wq, wk, wv)
        )
        queries, keys = attention.normed(queries, keys)
        place = slice(columns.stop - 1, columns.stop)
        cache[0][:, :, place] = keys @ rotations[1]
        cache[1][:, :, place] = values
        keys, values = (array[:, :, columns] for array in cache)
        # As `ops_cpu.masked_attention`, without what a gradient needs.
        scores = queries @ rotations[0] @ keys.swapaxes(-1, -2)
        scores = scores if mask is None else scores + mask
        exps = ops_cpu.exp(scores - scores.max(-1, keepdims=True))
        attended = exps @ values / exps.sum(-1, keepdims=True)
        x = x + wo(attended.reshape(len(x), -1))
        normed = layer.ffn_norm(x)
        gate, up = w1(normed), w3(normed)
        return x + w2(gate / (1 + mx.power(1 / math.e, gate)) * up)  # SwiGLU

    return run_layer


def product_of_rows(layer: nn.Module) -> Callable:
    """A function of x (B, K) that returns what a linear layer does."""
    linear = base_linear(layer)
    if isinstance(linear, nn.QuantizedLinear) or "lora_a" in layer or "bias" in linear:
        return layer
    weight, transposed = layer.weight, layer.weight.T
    mx.eval(transposed)
    # Where there are more inputs than outputs, MKL takes two thirds of the time for the transposed
    # matrices.
    if weight.shape[1] > weight.shape[0]:
        return lambda x: (weight @ x.T).T
    return lambda x: x @ transposed
