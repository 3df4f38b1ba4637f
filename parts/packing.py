"""Short texts that share a row: which, in an order of their own in each epoch, and as arrays.

A row holds texts one after the other, without their last tokens, which predict nothing. Next to
each token stands its position in its text: by it the network blocks attention between texts
(`ops.PackedRows`), so that each has the loss that it has alone. No text is split.

A batch has the positions of `batch_size` rows of `max_length` tokens. Where the texts are short,
each of these is computed as several shorter rows: attention then looks at less that is masked.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts.batches import to_arrays
from parts.token_rows import TokenRows

import mlx.core as mx

FULL = 0.95  # the share of positions that are to hold a token
MULTIPLE = 8  # of a row's positions


@dataclass(frozen=True)
class Packing:
    """Which texts share rows. The same lengths are packed the same way in each epoch, and texts of
    one length take each other's places.
    """

    row_length: int  # positions
    batch_rows: int  # rows of a batch
    row_of: np.ndarray  # (n,), the row of each text, of all from the longest to the shortest
    n_rows: int
    fullness: float  # the share of positions that hold a token

    @property
    def n_batches(self) -> int:
        """The batches of an epoch."""
        return self.n_rows // self.batch_rows

    def summary(self) -> str:
        """Return what to add to the number of texts."""
        share = f"{100 * self.fullness:.1f} % full"
        return f" in {self.n_rows} rows of {self.row_length}, {share}"


def make_packing(lengths: np.ndarray, batch_size: int, max_length: int) -> Packing:
    """Return the packing of texts of these lengths, in tokens (n,), in rows of `max_length`, or of
    a half, a quarter ... of it: the shortest that are full, and as long as the longest text. By
    powers of two, since the products of a GPU want round numbers of rows.
    """
    sizes = -np.sort(1 - lengths)  # the inputs of each text, descending
    max_length = max(max_length, int(sizes[0]) + 1)
    n_parts = 1 << ((max_length - 1) // int(sizes[0])).bit_length() - 1
    while True:
        row_length = -(-(max_length - 1) // (n_parts * MULTIPLE)) * MULTIPLE
        row_of = best_fit(sizes, row_length)
        n_rows = int(row_of.max()) + 1
        is_full = sizes.sum() >= FULL * (n_rows - 1) * row_length  # but for the last row
        if n_parts == 1 or is_full:
            batch_rows = min(batch_size * n_parts, n_rows)
            fullness = float(sizes.sum() / (n_rows * row_length))
            return Packing(row_length, batch_rows, row_of, n_rows, fullness)
        n_parts //= 2


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row (n,) of each item: the fullest that still has room for it, else a new one.

    sizes: (n,), descending, none above `capacity`. Source: best fit decreasing, in Johnson,
    "Near-Optimal Bin Packing Algorithms", 1973. Equal items are placed together, so that millions
    take no longer than their different sizes do.
    """
    row_of, n_rows = np.empty(len(sizes), np.int64), 0
    by_room: dict[int, list[np.ndarray]] = {}  # rows that are not full, by the room they have
    rooms = 0  # as bits: which of these lists hold any
    starts = np.flatnonzero(np.diff(sizes, prepend=0))
    for start, end in itertools.pairwise([*starts.tolist(), len(sizes)]):
        size = int(sizes[start])
        while start < end:
            # Take the rows with the least room that does, or new ones.
            fitting = rooms >> size
            room = size + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = room // size
            n_needed = -(-(end - start) // each)
            if fitting:
                rows = np.concatenate(by_room.pop(room))
                rooms ^= 1 << room
            else:
                rows = np.arange(n_rows, n_rows + n_needed)
                n_rows += n_needed
            # Fill them: each with as many items as it takes, but for the last.
            used, unused = rows[:n_needed], rows[n_needed:]
            n_placed = min(len(used) * each, end - start)
            row_of[start : start + n_placed] = used.repeat(each)[:n_placed]
            start += n_placed
            n_last = n_placed - (len(used) - 1) * each
            for group, left in (
                (unused, room),
                (used[:-1], room - each * size),
                (used[-1:], room - n_last * size),
            ):
                if len(group) and left:
                    by_room.setdefault(left, []).append(group)
                    rooms |= 1 << left
    return row_of


def packed_batches(
    rows: TokenRows, batch_size: int, max_length: int, seed: int, skip: int
) -> Iterator[tuple[mx.array, ...]]:
    """Yield batches of packed rows for ever, but for the first `skip`; see `lora.iterate_batches`.

    An epoch's order depends on `seed` and the epoch alone; rows that fill no batch are left out,
    with other texts in each epoch.
    """
    packing = make_packing(rows.lengths, batch_size, max_length)
    by_row = np.argsort(packing.row_of, kind="stable")
    ends = np.cumsum(np.bincount(packing.row_of))
    epochs_done, skip = divmod(skip, packing.n_batches)
    for epoch in itertools.count(epochs_done):
        # Texts of one length are in random order, and so are the rows.
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(rows))
        order = order[np.argsort(-rows.lengths[order], kind="stable")]
        texts_of = np.split(order[by_row], ends[:-1])
        shuffled = rng.permutation(packing.n_rows)
        for i in range(skip if epoch == epochs_done else 0, packing.n_batches):
            chosen = shuffled[i * packing.batch_rows : (i + 1) * packing.batch_rows]
            texts = [[rows[k] for k in texts_of[row]] for row in chosen]
            yield pack_batch(texts, packing.row_length, rows.masked)


def pack_batch(
    rows: list[list[np.ndarray]], length: int, masked: bool = False
) -> tuple[mx.array, ...]:
    """Return inputs (B, length, 2), token ids and their positions in their texts, and what else
    `batches.pad_batch` returns. What a row has left is a text of padding.

    rows: of token ids, the texts of each row.
    """
    ids, positions = np.zeros((2, len(rows), length), np.int32)
    targets = np.full((len(rows), length), -1, np.int32)
    lengths = np.zeros(len(rows), np.int32)
    for i, texts in enumerate(rows):
        end = 0
        for text in texts:
            start, end = end, end + len(text) - 1
            ids[i, start:end], targets[i, start:end] = text[:-1], text[1:]
            positions[i, start:end] = np.arange(end - start)
        positions[i, end:] = np.arange(length - end)
        lengths[i] = end
    inputs = np.stack([np.where(ids < 0, ~ids, ids), positions], axis=-1)
    return to_arrays(inputs, targets, lengths, masked)
