"""A model's layers as a CPU trains them, in NumPy: forward and backward pass at once.

MLX's exponentials take a CPU some twenty times as long as NumPy's, and MLX hands the operations of
all streams to their threads one by one: where one waits, the others soon do. Here each share of a
batch's rows has a thread of its own, and the gradients are written by hand.

Shapes in comments: B rows of a share, L positions, N = B L, D = `dim`, H = `n_heads`, K =
`n_kv_heads`, O outputs, R the rank.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts.rope import Rope, cos_sin
from parts.sgemm import as_numpy, in_type_of, multiply, to_float32

import mlx.nn as nn

QUERY_BLOCK = 128  # positions whose attention is computed at once


class Pair(NamedTuple):
    """LoRA matrices (D, R) and (R, O), or their gradients."""

    a: np.ndarray
    b: np.ndarray


class Linear:
    """A linear layer with its frozen weights."""

    def __init__(self, layer: nn.Module):
        linear = layer.linear if "lora_a" in layer else layer
        self.layer, self.is_adapted = layer, "lora_a" in layer
        self.weight = as_numpy(linear.weight)  # (O, D), float32 or the bits of bfloat16
        self.bias = to_float32(as_numpy(linear.bias)) if "bias" in linear else None

    def __call__(
        self,
        x: np.ndarray,
        pair: Pair | None,
        residual: np.ndarray | None = None,
        cast: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The outputs (N, O) for x (N, D), plus `residual`, which becomes them. And x A times the
        scale (N, R), if there is a pair. cast: x in the weight's type, where it is known.
        """
        cast = in_type_of(self.weight, x) if cast is None else cast
        y = multiply(cast, self.weight.T, residual, add=residual is not None)
        if self.bias is not None:
            y += self.bias
        if pair is None:
            return y, None
        inner = multiply(x, pair.a)
        inner *= np.float32(self.layer.scale)
        multiply(inner, pair.b, y, add=True)
        return y, inner

    def backward(
        self,
        x: np.ndarray,
        inner: np.ndarray | None,
        gradient: np.ndarray,
        pair: Pair | None,
        of_pair: Pair | None,
        of_x: np.ndarray | None = None,
    ) -> np.ndarray:
        """Add the gradient of x (N, D) to `of_x`, and return it. That of the pair goes to
        `of_pair`. gradient: of the outputs.
        """
        cast = in_type_of(self.weight, gradient)
        of_x = multiply(cast, self.weight, of_x, add=of_x is not None)
        if pair is not None:
            of_inner = multiply(gradient, pair.b.T)
            of_inner *= np.float32(self.layer.scale)
            multiply(of_inner, pair.a.T, of_x, add=True)
            multiply(x.T, of_inner, of_pair.a)
            multiply(inner.T, gradient, of_pair.b)
        return of_x


class Norm:
    """RMSNorm."""

    def __init__(self, norm: nn.Module):
        self.weight, self.eps = to_float32(as_numpy(norm.weight)), np.float32(norm.eps)

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x (..., D), normalised, and what it is multiplied by for that (..., 1)."""
        mean = np.einsum("...d,...d->...", x, x)[..., None] / np.float32(x.shape[-1])
        factor = 1 / np.sqrt(mean + self.eps)
        normed = x * factor
        normed *= self.weight
        return normed, factor

    def backward(
        self,
        x: np.ndarray,
        normed: np.ndarray,
        factor: np.ndarray,
        gradient: np.ndarray,
        residual: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the gradient of x, plus `residual`. gradient: of `normed`, which it overwrites."""
        mean = np.einsum("nd,nd->n", gradient, normed)[:, None] / np.float32(x.shape[1])
        gradient *= self.weight
        gradient *= factor
        gradient -= x * (mean * factor * factor)
        if residual is not None:
            gradient += residual
        return gradient


# -------------------------------------------------------------------------------------------------
# Attention


@lru_cache(maxsize=8)
def rotation(length: int, rope: Rope) -> np.ndarray:
    """Numbers (L, head_dim / 2), complex64, that rotate pairs of channels at each position."""
    cosines, sines = (as_numpy(table)[:, 0, ::2] for table in cos_sin(0, length, rope))
    return cosines + 1j * sines


class Block(NamedTuple):
    """Queries whose attention is computed at once, and the keys that they see."""

    queries: slice
    keys: slice
    mask: np.ndarray  # (B or 1, n, n_masked), to add to the scores of the last keys


def make_blocks(length: int, window: int | None, positions: np.ndarray | None) -> list[Block]:
    """The blocks of rows of so many positions. positions: (B, L), in their texts, of packed rows.
    window: see `ops.attention`.
    """
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        queries = np.arange(start, min(start + QUERY_BLOCK, length))
        ages = np.full_like(queries, length if window is None else window - 1)[None]
        if positions is not None:
            ages = np.minimum(positions[:, queries], ages)
        first = max(0, int((queries - ages).min()))
        is_plain = positions is None and (window is None or window > queries[-1])
        keys = np.arange(start if is_plain else first, queries[-1] + 1)
        distances = queries[:, None] - keys
        hidden = (distances < 0) | (distances > ages[..., None])
        mask = np.where(hidden, np.float32(-np.inf), np.float32(0))
        blocks.append(Block(slice(start, len(queries) + start), slice(first, keys[-1] + 1), mask))
    return blocks


class Attention:
    """Attention over heads that share keys and values."""

    def __init__(self, n_heads: int, n_kv_heads: int):
        self.heads = [(head, head * n_kv_heads // n_heads) for head in range(n_heads)]

    def __call__(
        self, queries: np.ndarray, keys: np.ndarray, values: np.ndarray, blocks: list[Block]
    ) -> tuple[np.ndarray, list]:
        """The output for queries (B, L, H, head_dim), which are scaled, and keys and values (B, L,
        K, head_dim), in the queries' shape; and of each row and block the exponentials (H, n,
        n_keys) and their sums (H, n, 1).
        """
        out, kept = np.empty_like(queries), []
        for row in range(len(queries)):
            for where, seen, mask in blocks:
                n, n_keys = where.stop - where.start, seen.stop - seen.start
                exps = np.empty((len(self.heads), n, n_keys), np.float32)
                for head, group in self.heads:
                    multiply(queries[row, where, head], keys[row, seen, group].T, exps[head])
                exps[..., n_keys - mask.shape[-1] :] += mask[row % len(mask)]
                exps -= exps.max(-1, keepdims=True)
                np.exp(exps, out=exps)
                sums = exps.sum(-1, keepdims=True)
                for head, group in self.heads:
                    multiply(exps[head], values[row, seen, group], out[row, where, head])
                out[row, where] /= sums.swapaxes(0, 1)
                kept.append((exps, sums))
        return out, kept

    def backward(
        self,
        queries: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
        blocks: list[Block],
        results: tuple[np.ndarray, list],
        gradient: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The gradients of queries, keys and values. results: what `__call__` returned."""
        out, kept = results
        of_queries, of_keys = np.empty_like(queries), np.zeros_like(keys)
        of_values = np.zeros_like(values)
        kept = iter(kept)
        for row in range(len(queries)):
            for where, seen, _ in blocks:
                exps, sums = next(kept)
                scaled = gradient[row, where] / sums.swapaxes(0, 1)  # (n, H, head_dim)
                # The sum over a row of weights times their gradients is that of output times its
                # gradient (Dao et al., "FlashAttention", 2022), which has fewer columns.
                mean = np.einsum("nhd,nhd->hn", scaled, out[row, where])[..., None]
                of_scores = np.empty_like(exps)
                for head, group in self.heads:
                    multiply(scaled[:, head], values[row, seen, group].T, of_scores[head])
                of_scores -= mean
                of_scores *= exps
                for head, group in self.heads:
                    multiply(of_scores[head], keys[row, seen, group], of_queries[row, where, head])
                    of_key, of_value = of_keys[row, seen, group], of_values[row, seen, group]
                    multiply(of_scores[head].T, queries[row, where, head], of_key, add=True)
                    multiply(exps[head].T, scaled[:, head], of_value, add=True)
        return of_queries, of_keys, of_values


# -------------------------------------------------------------------------------------------------
# Layers


NAMES = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")


class Batch(NamedTuple):
    """What all layers have in common: a batch's shape (B, L), what rotates heads, (L, 1, head_dim /
    2) or (B, L, 1, head_dim / 2), and the blocks of attention.
    """

    shape: tuple[int, int]
    table: np.ndarray
    blocks: list[Block]


class Layer:
    """A transformer block."""

    def __init__(self, block: nn.Module):
        attention, feed_forward = block.attention, block.feed_forward
        self.linears = [
            Linear(attention[name] if name in attention else feed_forward[name]) for name in NAMES
        ]
        self.norms = Norm(block.attention_norm), Norm(block.ffn_norm)
        self.attention = Attention(attention.n_heads, attention.n_kv_heads)
        self.head_dim, self.scale = attention.head_dim, np.float32(attention.scale)

    def __call__(
        self, x: np.ndarray, pairs: list[Pair | None], batch: Batch
    ) -> tuple[np.ndarray, tuple]:
        """The output (N, D) for x (N, D), and what `backward` needs."""
        wq, wk, wv, wo, w1, w3, w2 = zip(self.linears, pairs, strict=True)
        normed, factor = self.norms[0](x)
        cast = in_type_of(wq[0].weight, normed)
        (q, in_q), (k, in_k), (v, in_v) = (
            linear(normed, pair, cast=cast) for linear, pair in (wq, wk, wv)
        )
        q, k, v = (y.reshape(*batch.shape, -1, self.head_dim) for y in (q, k, v))
        for heads, numbers in ((q, batch.table * self.scale), (k, batch.table)):
            heads.view(np.complex64)[:] *= numbers
        attended = self.attention(q, k, v, batch.blocks)
        out = attended[0].reshape(len(x), -1)
        middle, in_o = wo[0](out, wo[1], x.copy())
        normed_2, factor_2 = self.norms[1](middle)
        cast = in_type_of(w1[0].weight, normed_2)
        (gate, in_1), (up, in_3) = (linear(normed_2, pair, cast=cast) for linear, pair in (w1, w3))
        divisor = np.exp(-gate)
        divisor += 1
        silu = np.divide(gate, divisor, out=gate)
        product = silu * up
        y, in_2 = w2[0](product, w2[1], middle.copy())
        inners = in_q, in_k, in_v, in_o, in_1, in_3, in_2
        return y, (
            *(x, normed, factor, q, k, v, attended, middle, normed_2, factor_2),
            *(divisor, silu, up, product, inners),
        )

    def backward(
        self,
        gradient: np.ndarray,
        kept: tuple,
        pairs: list[Pair | None],
        of_pairs: list[Pair | None],
        batch: Batch,
    ) -> np.ndarray:
        """The gradient of x (N, D), from that of the output, which it may overwrite. Those of the
        pairs go to `of_pairs`.
        """
        x, normed, factor, q, k, v, attended, middle, normed_2, factor_2, *kept = kept
        divisor, silu, up, product, inners = kept
        wq, wk, wv, wo, w1, w3, w2 = zip(self.linears, inners, pairs, of_pairs, strict=True)

        def back(
            layer: tuple, x: np.ndarray, gradient: np.ndarray, of_x: np.ndarray | None = None
        ) -> np.ndarray:
            linear, inner, pair, of_pair = layer
            return linear.backward(x, inner, gradient, pair, of_pair, of_x)

        of_product = back(w2, product, gradient)
        # The gradients of gate and up: of silu, (silu + (1 - silu) / divisor).
        of_gate = 1 - silu
        of_gate /= divisor
        of_gate += silu
        of_gate *= up
        of_gate *= of_product
        of_up = np.multiply(of_product, silu, out=of_product)
        of_normed = back(w3, normed_2, of_up, back(w1, normed_2, of_gate))
        gradient = self.norms[1].backward(middle, normed_2, factor_2, of_normed, gradient)
        of_out = back(wo, attended[0].reshape(len(x), -1), gradient).reshape(q.shape)
        of_q, of_k, of_v = self.attention.backward(*(q, k, v, batch.blocks, attended, of_out))
        for heads, numbers in ((of_q, batch.table * self.scale), (of_k, batch.table)):
            heads.view(np.complex64)[:] *= numbers.conj()
        of_normed = None
        for layer, heads in ((wq, of_q), (wk, of_k), (wv, of_v)):
            of_normed = back(layer, normed, heads.reshape(len(x), -1), of_normed)
        return self.norms[0].backward(x, normed, factor, of_normed, gradient)
