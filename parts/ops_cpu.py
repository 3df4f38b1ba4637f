"""The operations of the network for a CPU, with their gradients.

Once products are fast, a CPU spends its time in exponentials: each is computed no more often than
it must be, and in the cheapest of MLX's ways. The forward pass keeps what the gradient needs.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts.rope import Rope, cos_sin, rotate_half_matrix

import mlx.core as mx

QUERY_BLOCK = 128  # positions whose attention is computed at once


def exp(x: mx.array) -> mx.array:
    """e to the x. The power is as exact as `mx.exp`, and takes a third of its time."""
    return mx.power(math.e, x)


def row_max(x: mx.array) -> mx.array:
    """The maximum along the last axis, which is kept with size 1. A CPU compares rows with each
    other faster than the values of one.
    """
    if x.shape[-1] % 128 == 0:
        x = x.reshape(*x.shape[:-1], -1, 128).max(-2)
    return x.max(-1, keepdims=True)


def row_sum(x: mx.array) -> mx.array:
    """The sum over the last axis, which is kept with size 1. A product is the fastest way."""
    return x @ column_of_ones(x.shape[-1], x.dtype)


@lru_cache
def column_of_ones(n: int, dtype: mx.Dtype) -> mx.array:
    """Ones (n, 1)."""
    return mx.array(np.ones((n, 1)), dtype)


# -------------------------------------------------------------------------------------------------
# SwiGLU


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up`, in their shape and dtype."""
    return swiglu_with_parts(gate, up)[0]


@mx.custom_function
def swiglu_with_parts(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """SwiGLU, silu(gate), and what silu divides by."""
    divisor = 1 + mx.power(1 / math.e, gate)  # exp(-gate), without a pass for the sign
    silu = gate / divisor
    return silu * up, silu, divisor


@swiglu_with_parts.vjp
def swiglu_vjp(
    primals: tuple[mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array, mx.array],
    outputs: tuple[mx.array, mx.array, mx.array],
) -> tuple[mx.array, mx.array]:
    """The gradients of gate and up."""
    (_, up), (cotangent, *_), (_, silu, divisor) = primals, cotangents, outputs
    return cotangent * up * (silu + (1 - silu) / divisor), cotangent * silu


# -------------------------------------------------------------------------------------------------
# Attention


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None = None
) -> mx.array:
    """See `ops.attention`. In blocks of queries, so that keys which no query sees cost nothing."""
    batch, n_heads, length, head_dim = queries.shape
    n_kv_heads, n_positions = keys.shape[1:3]
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        block = queries[:, :, start : start + QUERY_BLOCK] * scale
        n = block.shape[2]
        # The keys that the block's queries see.
        end = n_positions - length + start + n
        seen = slice(0 if window is None else max(0, end - n - window + 1), end)
        n_keys = end - seen.start
        # The queries that share a key head are one matrix: (B, K, H / K * n, head_dim).
        block = block.reshape(batch, n_kv_heads, -1, head_dim)
        hides = window if window is not None and window < n_keys else None
        mask = causal_mask(n, n_keys, n_heads // n_kv_heads, block.dtype, hides)
        out, *_ = masked_attention(block, keys[:, :, seen], values[:, :, seen], mask)
        blocks.append(out.reshape(batch, n_heads, n, head_dim))
    return mx.concatenate(blocks, axis=2)


class BlockMask(NamedTuple):
    """Which keys the queries of a block see, in packed rows."""

    queries: slice
    keys: slice  # all that one of them sees
    mask: mx.array  # (B, 1, n_shared * n, n_keys), to add to the scores


def packed_masks(
    positions: mx.array, n_shared: int, window: int | None, dtype: mx.Dtype
) -> list[BlockMask]:
    """See `ops.packed_rows`. A mask for each block of queries."""
    places, masks = np.array(positions), []
    length = places.shape[1]
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        ages = np.minimum(places[:, start:end], length if window is None else window - 1)
        first = int((np.arange(start, end) - ages).min())  # key that one of the queries sees
        distances = np.arange(start, end)[:, None] - np.arange(first, end)
        hidden = (distances < 0) | (distances > ages[..., None])
        mask = np.tile(np.where(hidden, -np.inf, 0), (1, n_shared, 1))[:, None]
        masks.append(BlockMask(slice(start, end), slice(first, end), mx.array(mask, dtype)))
    return masks


def packed_attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, masks: list[BlockMask]
) -> mx.array:
    """See `ops.attention`."""
    batch, n_heads, _, head_dim = queries.shape
    blocks = []
    for block, seen, mask in masks:
        rows = queries[:, :, block] * scale
        rows = rows.reshape(batch, keys.shape[1], -1, head_dim)
        out, *_ = masked_attention(rows, keys[:, :, seen], values[:, :, seen], mask)
        blocks.append(out.reshape(batch, n_heads, -1, head_dim))
    return mx.concatenate(blocks, axis=2)


@lru_cache(maxsize=16)  # what the layers have in common
def causal_mask(
    n: int, n_keys: int, group_size: int, dtype: mx.Dtype, window: int | None = None
) -> mx.array:
    """What to add to the scores of the last `n` of `n_keys` positions, for each of the
    `group_size` heads that share a key head: (group_size * n, n_keys) of zeros, and of minus
    infinity where keys come later, or are not among the `window` last ones.
    """
    ages = np.arange(n_keys - n, n_keys)[:, None] - np.arange(n_keys)
    hidden = (ages < 0) | (ages >= (n_keys if window is None else window))
    return mx.array(np.tile(np.where(hidden, -np.inf, 0), (group_size, 1)), dtype)


@mx.custom_function
def masked_attention(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The output, exp(scores - their maximum), and its sum (..., 1)."""
    scores = queries @ keys.swapaxes(-1, -2) + mask
    exps = exp(scores - row_max(scores))
    sum_exp = row_sum(exps)
    return exps @ values / sum_exp, exps, sum_exp


@masked_attention.vjp
def masked_attention_vjp(
    primals: tuple[mx.array, mx.array, mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array, mx.array],
    outputs: tuple[mx.array, mx.array, mx.array],
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """The gradients of queries, keys and values; none of the mask."""
    queries, keys, values, mask = primals
    out, exps, sum_exp = outputs
    cotangent = cotangents[0] / sum_exp
    # The sum over a row of weights times their gradients is that of output times its gradient (Dao
    # et al., "FlashAttention", 2022), which has fewer columns.
    gradient = exps * (cotangent @ values.swapaxes(-1, -2) - row_sum(cotangent * out))
    return (
        gradient @ keys,
        gradient.swapaxes(-1, -2) @ queries,
        exps.swapaxes(-1, -2) @ cotangent,
        mx.zeros_like(mask),
    )


# -------------------------------------------------------------------------------------------------
# Rotary positions


def rope(x: mx.array, offset: int | mx.array, rope: Rope) -> mx.array:
    """See `ops.rope`."""
    if isinstance(offset, mx.array):
        tables = (table[offset] for table in cos_sin(0, x.shape[1], rope))
    else:
        tables = cos_sin(offset, x.shape[1], rope)
    return rotate(x, *(table.astype(x.dtype) for table in tables))


@mx.custom_function
def rotate(x: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
    """Rotate pairs of channels of x (B, L, heads, head_dim) by angles (L, 1, head_dim), or of each
    row (B, L, 1, head_dim).
    """
    return x * cosines + x @ rotate_half_matrix(x.shape[-1], x.dtype) * sines


@rotate.vjp
def rotate_vjp(
    primals: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The gradient of x, rotated back by the same angles; none of the tables."""
    _, cosines, sines = primals
    tables = mx.zeros_like(cosines), mx.zeros_like(sines)
    return rotate(cotangent, cosines, -sines), *tables
