"""Rows of token ids to arrays: padded to few lengths, with little padding."""

import numpy as np

from parts import device  # noqa: F401  before MLX, for its BLAS

import mlx.core as mx

PADDING = 0.045  # the share of a batch's length by which the next shorter one is shorter, at least


def bucket_lengths(lengths: np.ndarray) -> np.ndarray:
    """Return the positions (n,) that each row's inputs are padded to: one of few lengths, since a
    GPU prepares itself for each again, and yet with little padding.

    lengths: of the rows, in tokens (n,).
    """
    found, which = np.unique(lengths - 1, return_inverse=True)  # ascending
    padded, current = np.zeros_like(found), None
    for i in reversed(range(len(found))):
        multiple = -(-int(found[i]) // 8) * 8
        if current is None or multiple <= (1 - PADDING) * current:
            current = multiple
        padded[i] = current
    return padded[which]


def pad_batch(rows: list[np.ndarray], length: int, masked: bool = False) -> tuple[mx.array, ...]:
    """Return inputs and targets of `length` positions, and lengths; see `iterate_batches`. masked:
    whether there are tokens that do not count, which `token_rows` explains. Where they are at least
    half of the places, only the targets that count are left, and their positions follow.
    """
    padded = np.zeros((len(rows), length + 1), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    lengths = np.array([len(row) - 1 for row in rows], np.int32)
    inputs, targets = np.where(padded < 0, ~padded, padded)[:, :-1], padded[:, 1:]
    return to_arrays(inputs, targets, lengths, masked)


def to_arrays(
    inputs: np.ndarray, targets: np.ndarray, lengths: np.ndarray, masked: bool
) -> tuple[mx.array, ...]:
    """Return the arrays of a batch, for `lora.loss`: see `pad_batch`. inputs: (B, L, ...)."""
    length, positions = targets.shape[1], ()
    if masked:
        counts = (targets >= 0) & (np.arange(length) < lengths[:, None])
        targets = np.where(counts, targets, -1)
        kept = keep_targets(targets, counts)
        if kept[0].shape[1] <= length // 2:
            targets, lengths, *positions = kept
    return tuple(map(mx.array, (inputs, targets, lengths, *positions)))


def keep_targets(
    targets: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drop the targets that do not count, where they are many: return those that do (B, P), int32,
    how many a row has (B,), and their positions (B, P). P is one of eight sizes, since each is
    another step to a GPU; a row's further places hold any targets.

    targets: (B, L); counts: (B, L), whether a target counts.
    """
    lengths, length = counts.sum(1).astype(np.int32), targets.shape[1]
    eighth = -(-length // 8)
    n = min(length, max(1, -(-lengths.max() // eighth)) * eighth)
    positions = np.argsort(~counts, axis=1, kind="stable")[:, :n].astype(np.int32)
    return np.take_along_axis(targets, positions, 1), lengths, positions
