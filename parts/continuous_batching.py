"""Answer many prompts in the rows of one batch, which others take over when they end.

Source: Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models",
2022, which calls it continuous batching.
"""

from collections import deque
from collections.abc import Iterator
from typing import Protocol

from parts import device  # before MLX, for its BLAS
from parts.decoder import prefill_step
from parts.decoder_batch import BatchDecoder
from parts.sampling import GREEDY, Sampler, Sampling, new_keys

import mlx.core as mx
import mlx.nn as nn

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
        self._model = model
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
        lengths, n_tokens = [len(row.prompt_ids) for row, _ in new], prefill_step(self._model)
        for size in group_sizes(lengths, n_tokens):
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
        device.give_back_memory()  # of the prompts

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


def group_sizes(lengths: list[int], n_tokens: int) -> Iterator[int]:
    """Yield how many prompts, of these ascending lengths, go through the model together: those that
    have no more than `n_tokens` with their padding. Where they are a quarter of that, a longer one,
    for which the others would be padded, is the next one's.
    """
    n, longest = 0, 0
    for length in lengths:
        is_filled = n * longest * 4 >= n_tokens and length > longest
        if n and (is_filled or (n + 1) * length > n_tokens):
            yield n
            n = 0
        n, longest = n + 1, length
    if n:
        yield n
