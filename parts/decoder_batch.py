"""Generate text for many prompts at once: a row of a batch for each, and others when rows end.

         first               end
row 0    . . . p p p p a a a a       p  of a prompt
row 1    p p p p p p p p a a a       a  of its answer
row 2    . . . . . . . . p p p       .  padding, which is masked: row 2 has just replaced one

All rows have their newest token in the same column, so that a new one is written in one piece and
no row is copied while it grows. A row begins at a column of its own. The rotary position of a token
is its column: attention sees no more than how far two positions are apart.

Continuous batching: Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative
Models", 2022.
"""

from collections import deque
from collections.abc import Iterator
from itertools import groupby
from typing import Protocol

import numpy as np

from parts import device, ops, ops_cpu
from parts.decoder import PREFETCH, PREFILL_STEP, after_attention, before_attention
from parts.merged_linear import MergedLinear
from parts.rope import Rope, amplitude
from parts.sampling import GREEDY, Sampler, Sampling, new_keys

import mlx.core as mx
import mlx.nn as nn

ROOM = 256  # columns by which the cache grows
SAME_SHAPE = 64  # a GPU attends to a multiple of so many columns: each shape costs it time once
FAR = (
    8192  # positions after which they are counted from 0 again, since float32 makes angles of them
)
REFILL = 8  # rows are replaced when one of so many has ended: each time the weights are read again


class Row(Protocol):
    """A prompt and what becomes of its answer."""

    prompt_ids: list[int]
    ids: list[int]  # of the answer so far

    def left(self) -> int:
        """Return how many more tokens it takes at most."""

    def add(self, token: int) -> bool:
        """Take the next token. Return whether the answer has ended."""


def generate_rows(
    model: nn.Module,
    rows: list[Row],
    n_slots: int,
    sampling: Sampling = GREEDY,
    vocab_size: int | None = None,
) -> Iterator[Row]:
    """Answer the rows, up to `n_slots` at a time, beginning with the first; yield each when it has
    ended. The random numbers of each are its own, whatever `n_slots` is.

    vocab_size: only so many of the first ids are sampled, by default all. Raises FloatingPointError
    where the first logits are not finite.
    """
    model.eval()
    n_slots = min(n_slots, len(rows))
    waiting = deque(zip(rows, new_keys(len(rows)), strict=True))
    batch = Batch(model, n_slots, max(len(row.prompt_ids) for row in rows), sampling, vocab_size)
    while waiting or batch.n_live:
        # Give free slots to waiting rows, or with none waiting, have no slots for those that ended.
        n_free = len(batch.slots) - batch.n_live
        if waiting and (n_free * REFILL >= len(batch.slots) or not batch.n_live):
            batch.fill([waiting.popleft() for _ in range(min(n_free, len(waiting)))])
        elif not waiting:
            batch.shrink()
        # Queue the tokens after the newest, then look at these.
        newest, holders = batch.tokens, list(batch.slots)
        if any(row is not None and row.left() > 1 for row in holders):
            batch.step()
        for slot, (row, token) in enumerate(zip(holders, newest.tolist(), strict=True)):
            if row is not None and row.add(token):
                batch.release(slot)
                yield row


class Batch:
    """The rows that are answered together, each in a slot, and their newest tokens."""

    def __init__(
        self,
        model: nn.Module,
        n_slots: int,
        longest: int,
        sampling: Sampling,
        vocab_size: int | None,
    ):
        self.slots: list[Row | None] = [None] * n_slots
        self.tokens = mx.zeros(n_slots, mx.int32)
        self._decoder = BatchDecoder(model, n_slots, longest)
        self._sampling, self._vocab_size = sampling, vocab_size
        self._sampler = Sampler(sampling, [[0]] * n_slots)
        self._checked = False  # whether logits are finite

    @property
    def n_live(self) -> int:
        """The rows whose answers have not ended."""
        return sum(row is not None for row in self.slots)

    def fill(self, new: list[tuple[Row, mx.array]]) -> None:
        """Put rows into free slots, each with the key of its random numbers, and queue their first
        tokens.
        """
        free = [slot for slot, row in enumerate(self.slots) if row is None]
        new = sorted(new, key=lambda pair: len(pair[0].prompt_ids))
        first = 0
        for size in group_sizes([len(row.prompt_ids) for row, _ in new]):
            rows, keys = zip(*new[first : first + size], strict=True)
            places = free[first : first + size]
            prompts = [row.prompt_ids for row in rows]
            logits = self._used(self._decoder.prefill(places, prompts))
            if not self._checked and not mx.isfinite(logits).all():
                raise FloatingPointError("the model's logits are not finite: give another --dtype")
            self._checked = True
            for slot, row in zip(places, rows, strict=True):
                self.slots[slot] = row
            sampler = Sampler(self._sampling, prompts, mx.stack(keys))
            self.tokens[mx.array(places)] = sampler(logits).astype(mx.int32)
            self._sampler.join(places, sampler, self._longest_text())
            first += size
        mx.async_eval(self.tokens)

    def step(self) -> None:
        """Queue the next token of each slot."""
        logits = self._used(self._decoder(self.tokens))
        self.tokens = self._sampler(logits).astype(mx.int32)
        mx.async_eval(self.tokens)

    def release(self, slot: int) -> None:
        """The row of a slot has ended."""
        self.slots[slot] = None
        self._decoder.release(slot)

    def shrink(self) -> None:
        """Have no slots for rows that have ended, if that is worth it."""
        if not 0 < self.n_live <= self._decoder.few(len(self.slots)):
            return
        kept = [slot for slot, row in enumerate(self.slots) if row is not None]
        self._decoder.keep(kept)
        self._sampler.keep(kept)
        self.slots = [self.slots[slot] for slot in kept]
        self.tokens = self.tokens[mx.array(kept)]

    def _used(self, logits: mx.array) -> mx.array:
        return logits[:, : self._vocab_size].astype(mx.float32)

    def _longest_text(self) -> int:
        """The tokens of the longest text, with the one that is queued."""
        return 1 + max(len(r.prompt_ids) + len(r.ids) for r in self.slots if r is not None)


def group_sizes(lengths: list[int]) -> Iterator[int]:
    """Yield how many prompts, of these ascending lengths, go through the model together."""
    n = 0
    for length in lengths:
        if n and (n + 1) * length > PREFILL_STEP:
            yield n
            n = 0
        n += 1
    if n:
        yield n


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
        self._pieces = [
            (device.compiled(before_attention(layer)), device.compiled(after_attention(layer)))
            for layer in model.layers
        ]

    def __call__(self, tokens: mx.array) -> mx.array:
        """Return the logits (B, V) after `tokens` (B), the newest of each row."""
        if self._end == self._caches[0][0].shape[2]:
            self._move()
        place, position = slice(self._end, self._end + 1), self._end + self._shift
        position = position if device.ON_CPU else mx.array(position)  # a number is compiled again
        self._end += 1
        seen, mask = self._seen()
        x = self._model.tok_embeddings(tokens[:, None])
        layers = zip(self._model.layers, self._pieces, self._caches, strict=True)
        for layer, (before, after), cache in layers:
            queries, *new = before(x, position)
            for i, values in enumerate(new):
                cache[i][:, :, place] = values
            keys, values = (array[:, :, seen] for array in cache)
            x = after(x, attend(queries, keys, values, layer.attention.scale, mask))
        return self._output(self._model.norm(x))[:, -1]

    def prefill(self, slots: list[int], prompts: list[list[int]]) -> mx.array:
        """Put prompts into these slots, and return the logits (n, V) after each."""
        if not self._live.any():
            self._end, self._shift = self._least_end, 0
        n = max(map(len, prompts))
        pads = np.array([n - len(ids) for ids in prompts])
        tokens = mx.array([[0] * (n - len(ids)) + ids for ids in prompts])
        # Run pieces of the prompts, padded on the left, through the layers.
        caches, step = [None] * len(self._caches), max(1, PREFILL_STEP // len(prompts))
        for start in range(0, n, step):
            end = min(start + step, n)
            mask = as_mask(prompt_mask(start, end, pads, self._window), self._model)
            position = self._end + self._shift - n + start
            x = prefill_piece(self._model, tokens[:, start:end], position, mask, caches)
        # Put keys and values to their places.
        place = slice(self._end - n, self._end)
        for cache, new in zip(self._caches, caches, strict=True):
            for i, values in enumerate(new):
                for places, rows in runs(slots):
                    cache[i][places, :, place] = values[rows]
        self._starts[slots], self._live[slots] = self._end - n + pads, True
        return self._output(self._model.norm(x[:, -1:]))[:, -1]

    def release(self, slot: int) -> None:
        """The row of a slot has ended. It is computed on until another takes its place."""
        self._live[slot] = False

    def few(self, n_rows: int) -> float:
        """The rows, of so many, for which it is worth leaving out the others. For a CPU each row is
        work; a GPU has to learn new shapes.
        """
        return n_rows * (7 / 8 if device.ON_CPU else 1 / 2)

    def keep(self, slots: list[int]) -> None:
        """Leave out all rows but these."""
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

    def _seen(self) -> tuple[slice, mx.array | None]:
        """Return the columns that the newest tokens attend to, and a mask of those before each."""
        first = self._first()
        if not device.ON_CPU:
            first = max(0, self._end - round_up(self._end - first))
        starts = self._starts
        if self._window is not None:
            starts = np.maximum(starts, self._end - self._window)
        if starts[self._live].max(initial=0) <= first:
            return slice(first, self._end), None
        visible = mx.arange(first, self._end) >= mx.array(starts)[:, None]
        return slice(first, self._end), as_mask(visible[:, None, None], self._model)

    def _move(self) -> None:
        """Make room for more columns: drop those that no row sees any more."""
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
    grouped = (queries * scale).reshape(batch, keys.shape[1], -1, head_dim)
    mask = mx.zeros(1, queries.dtype) if mask is None else mask
    return ops_cpu.masked_attention(grouped, keys, values, mask)[0].reshape(queries.shape)


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
