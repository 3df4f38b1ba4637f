"""Decode many texts at once, token by token: a row of a batch for each.

         first               end
row 0    . . . p p p p a a a a       p  of a prompt
row 1    p p p p p p p p a a a       a  of its answer
row 2    . . . . . . . . p p p       .  padding, which is masked: row 2 has just replaced one

All rows have their newest token in the same column, so that a new one is written in one piece and
no row is copied while it grows. A row begins at a column of its own. The rotary position of a token
is its column: attention sees no more than how far two positions are apart.
"""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby

import numpy as np

from parts import device, ops, ops_cpu
from parts.decoder import PREFETCH, after_attention, before_attention, prefill_step
from parts.decoder_batch_cpu import cpu_decoder
from parts.decoder_batch_cuda import kernel_layers
from parts.merged_linear import MergedLinear
from parts.rope import Rope, amplitude

import mlx.core as mx
import mlx.nn as nn

ROOM = 128  # columns by which the cache grows
SAME_SHAPE = 64  # a GPU attends to a multiple of so many columns: each shape costs it time once
FAR = 8192  # positions after which they are counted from 0 again: angles are made in float32


class BatchDecoder:
    """Decodes `n_rows` texts together, token by token. longest: tokens of a prompt at most."""

    def __init__(self, model: nn.Module, n_rows: int, longest: int):
        self._model, self._window = model, model.args.sliding_window
        self._starts, self._live = np.zeros(n_rows, np.int32), np.zeros(n_rows, bool)
        # The column of the next token. There is always room for a prompt before it.
        self._end = self._least_end = round_up(longest)
        self._shift = 0  # the position of column 0
        size = n_rows, self._end + ROOM
        self._caches = [[self._blank(*size), self._blank(*size)] for _ in model.layers]
        self._output = MergedLinear(model.output_layer)
        self._last = self._caches  # with it all is computed that writes into caches in place
        self._cpu_step = cpu_decoder(model) if device.ON_CPU else None
        self._run = None if self._cpu_step else self._way(model)

    def _way(self, model: nn.Module) -> Callable:
        """Return what computes the layers for x (B, 1, D) on this device."""
        run = None if device.ON_CPU else kernel_layers(model)
        if run:
            return partial(self._by_kernels, run)
        return partial(
            self._separately,
            [device.compiled(before_attention(layer)) for layer in model.layers],
            [device.compiled(after_attention(layer)) for layer in model.layers],
        )

    def __call__(self, tokens: mx.array) -> mx.array:
        """Return the logits (B, V) after `tokens` (B), the newest of each row."""
        if self._end == self._caches[0][0].shape[2]:
            self._move()
        position = self._end + self._shift
        self._end += 1
        if self._cpu_step:
            columns = slice(self._first(), self._end)
            return self._cpu_step(tokens, position, columns, self._visible(columns), self._caches)
        x = self._run(self._model.tok_embeddings(tokens[:, None]), position)
        self._last = x
        return self._output(self._model.norm(x))[:, -1]

    def _by_kernels(self, run: Callable, x: mx.array, position: int) -> mx.array:
        # Arrays of 8 bytes lie in memory that MLX shares with the processor.
        place = mx.array([position, self._end - 1])
        return run(x, place, mx.array(self._seen_starts()), self._caches)

    def _separately(
        self, befores: list[Callable], afters: list[Callable], x: mx.array, position: int
    ) -> mx.array:
        # A multiple of columns, so that there are few shapes.
        columns = slice(max(0, self._end - round_up(self._end - self._first())), self._end)
        place, visible = slice(self._end - 1, self._end), self._visible(columns)
        mask = None
        if visible is not None:
            mask = as_mask(mx.array(visible)[:, None, None], self._model)
        if not device.ON_CPU:
            position = mx.array(position)  # a number is compiled again
        layers = zip(self._model.layers, befores, afters, self._caches, strict=True)
        for layer, before, after, cache in layers:
            queries, *new = before(x, position)
            for i, values in enumerate(new):
                cache[i][:, :, place] = values
            keys, values = (array[:, :, columns] for array in cache)
            x = after(x, attend(queries, keys, values, layer.attention.scale, mask))
        return x

    def prefill(self, slots: list[int], prompts: list[list[int]]) -> mx.array:
        """Put prompts into these slots, and return the logits (n, V) after each."""
        if not self._live.any():
            self._end, self._shift = self._least_end, 0
            self._starts[:] = self._end - 1
        n = max(map(len, prompts))
        pads = np.array([n - len(ids) for ids in prompts])
        tokens = mx.array([[0] * (n - len(ids)) + ids for ids in prompts])
        # Run pieces of the prompts, padded on the left, through the layers.
        caches, step = [None] * len(self._caches), max(1, prefill_step(self._model) // len(prompts))
        for start in range(0, n, step):
            end = min(start + step, n)
            mask = as_mask(prompt_mask(start, end, pads, self._window), self._model)
            position = self._end + self._shift - n + start
            x = prefill_piece(self._model, tokens[:, start:end], position, mask, caches)
        # Put keys and values to their places.
        mx.eval(self._last)
        place = slice(self._end - n, self._end)
        for cache, new in zip(self._caches, caches, strict=True):
            for i, values in enumerate(new):
                for places, rows in runs(slots):
                    cache[i][places, :, place] = values[rows]
        self._starts[slots], self._live[slots] = self._end - n + pads, True
        return self._output(self._model.norm(x[:, -1:]))[:, -1]

    def release(self, slot: int) -> None:
        """The row of a slot has ended. It is computed on until another takes its place."""
        self._live[slot], self._starts[slot] = False, self._end - 1

    def few(self, n_rows: int) -> float:
        """The rows, of so many, for which it is worth leaving out the others. For a CPU each row is
        work; a GPU has to learn new shapes.
        """
        return n_rows * (7 / 8 if device.ON_CPU else 1 / 2)

    def keep(self, slots: list[int]) -> None:
        """Leave out all rows but these."""
        mx.eval(self._last)
        chosen = mx.array(slots)
        self._caches = [[array[chosen] for array in cache] for cache in self._caches]
        self._starts, self._live = self._starts[slots], self._live[slots]

    def _blank(self, n_rows: int, n_columns: int) -> mx.array:
        args, dtype = self._model.args, self._model.norm.weight.dtype
        return mx.zeros((n_rows, args.n_kv_heads, n_columns, args.head_dim), dtype)

    def _first(self) -> int:
        """The first column that a row may still see."""
        first = int(self._starts[self._live].min(initial=self._end))
        return first if self._window is None else max(first, self._end - self._window)

    def _visible(self, columns: slice) -> np.ndarray | None:
        """Return which of the columns each row sees (B, columns); None where it sees all."""
        starts = self._seen_starts()
        if starts[self._live].max(initial=0) <= columns.start:
            return None
        return np.arange(columns.start, columns.stop) >= starts[:, None]

    def _seen_starts(self) -> np.ndarray:
        """The first column that each row sees."""
        if self._window is None:
            return self._starts
        return np.maximum(self._starts, self._end - self._window)

    def _move(self) -> None:
        """Make room for more columns: drop those that no row sees any more."""
        mx.eval(self._last)
        first, n_rows = self._first(), len(self._live)
        end = max(self._least_end, round_up(self._end - first))
        front = self._blank(n_rows, end - (self._end - first))
        room = self._blank(n_rows, ROOM)
        self._shift += self._end - end
        back = self._shift if self._shift > FAR else 0
        for cache in self._caches:
            keys, values = (array[:, :, first : self._end] for array in cache)
            keys = rotated_back(keys, back, self._model.args.rope) if back else keys
            cache[:] = (mx.concatenate([front, array, room], axis=2) for array in (keys, values))
        self._shift -= back
        self._starts += end - self._end
        self._end = end


def bytes_of_row(model: nn.Module, length: int) -> int:
    """The bytes that keys and values of a text of up to so many tokens take at most."""
    args, dtype = model.args, model.norm.weight.dtype
    n_values = 2 * args.n_layers * args.n_kv_heads * args.head_dim
    return n_values * (round_up(length) + ROOM) * dtype.size


def round_up(n: int) -> int:
    """The next multiple of `SAME_SHAPE`."""
    return -(-n // SAME_SHAPE) * SAME_SHAPE


def runs(slots: list[int]) -> Iterator[tuple[slice, slice]]:
    """Yield ascending slots, those that follow each other as a slice, and their indices as one."""
    for _, run in groupby(enumerate(slots), key=lambda pair: pair[1] - pair[0]):
        (first, slot), *others = run
        n = len(others) + 1
        yield slice(slot, slot + n), slice(first, first + n)


def rotated_back(keys: mx.array, n: int, rope: Rope) -> mx.array:
    """Return keys (B, K, S, head_dim) as if all positions were `n` less."""
    batch, n_kv_heads, n_columns, head_dim = keys.shape
    heads = keys.reshape(batch * n_kv_heads, 1, n_columns, head_dim)
    return (ops.rope(heads, -n, rope) / amplitude(rope)).reshape(keys.shape).astype(keys.dtype)


# -------------------------------------------------------------------------------------------------
# Attention


def prompt_mask(start: int, end: int, pads: np.ndarray, window: int | None) -> mx.array:
    """Which of the first `end` columns of prompts those from `start` on see: (n, 1, L, end).

    pads: (n,), the columns of padding before each. A column of padding sees itself: the softmax of
    nothing would not be finite.
    """
    queries, keys = np.arange(start, end)[:, None], np.arange(end)
    hidden = (keys > queries) | (keys < pads[:, None, None])
    if window is not None:
        hidden |= keys <= queries - window
    return mx.array(~hidden | (keys == queries))[:, None]


def as_mask(visible: mx.array, model: nn.Module) -> mx.array:
    """Return the mask that `attend` takes. visible: (B, 1, L, S) boolean."""
    if not device.ON_CPU:
        return visible
    batch, _, length, n_columns = visible.shape
    mask = mx.where(visible, mx.array(0.0), -mx.inf).astype(model.norm.weight.dtype)
    # The queries that share a key head are one matrix.
    shape = batch, 1, model.args.n_heads // model.args.n_kv_heads, length, n_columns
    return mx.broadcast_to(mask[:, :, None], shape).reshape(batch, 1, -1, n_columns)


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | None
) -> mx.array:
    """Attention of queries (B, H, L, head_dim) to the keys and values (B, K, S, head_dim) that the
    mask of `as_mask` shows; without one, to all. Returns the queries' shape.
    """
    if not device.ON_CPU:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    batch, _, _, head_dim = queries.shape
    scores = (queries * scale).reshape(batch, keys.shape[1], -1, head_dim) @ keys.swapaxes(-1, -2)
    scores = scores if mask is None else scores + mask
    exps = ops_cpu.exp(scores - scores.max(-1, keepdims=True))
    return (exps @ values / exps.sum(-1, keepdims=True)).reshape(queries.shape)


def prefill_piece(
    model: nn.Module, tokens: mx.array, position: int, mask: mx.array, caches: list
) -> mx.array:
    """Return what the layers make of tokens (n, L), which begin at this position, and append their
    keys and values to the `caches`, an entry a layer, at first None.
    """
    x, queue = model.tok_embeddings(tokens), deque()
    for i, layer in enumerate(model.layers):
        attention = layer.attention
        queries, *new = attention.project(layer.attention_norm(x), position)
        if caches[i] is not None:
            new = [mx.concatenate(pair, axis=2) for pair in zip(caches[i], new, strict=True)]
        caches[i] = new
        attended = attend(queries, *new, attention.scale, mask)
        x = x + attention.wo(attended.transpose(0, 2, 1, 3).flatten(-2))
        x = x + layer.feed_forward(layer.ffn_norm(x))
        # As in `decoder.prefill`, no more than a few layers wait.
        mx.async_eval(new)
        queue.append(new)
        if len(queue) > PREFETCH:
            mx.eval(queue.popleft())
    return x
