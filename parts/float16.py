"""The values of a checkpoint as float16.

torch casts well, but importing it takes longer than to convert a small model: here NumPy casts
bfloat16, and torch what few checkpoints still hold.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

CHUNK = 2**17  # values that are cast at a time: the processor's cache holds them
REST = 0x7FFF  # of the bits of both types, without the sign
FRACTION = 7  # bits of bfloat16's fraction; its exponent counts from 127, float16's from 15
# The exponents, as bfloat16 has them, of those values that have the form of others in float16 ...
NORMAL = range(127 - 14, 127 + 16)
EXACT = range(127 - 17, 127 + 16)  # ... and of those that float16 need not round
NORMAL_BITS = NORMAL.start << FRACTION  # of the least that is not among these others
GROUP = 8  # neighbours that are looked up where one of them needs it


def to_float16(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return the values as float16, rounded to the nearest.

    dtype: of the values, a float; bfloat16's are their bits, uint16, which are overwritten.
    Raises OverflowError where one is not finite in float16.
    """
    values = np.ascontiguousarray(values)
    if dtype == "bfloat16":
        for chunk in chunks(values):
            cast_in_place(chunk)
        return values.view(np.float16)
    if dtype != "float16":
        import torch

        values = torch.from_numpy(values).to(torch.float16).numpy()
    check_finite(values.view(np.uint16))
    return values


def round_to_float16(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16's bits, uint16, with the values rounded as `to_float16` does; they are
    overwritten. bfloat16 holds what that yields: below 2**-17 float16 has fewer bits than it.
    """
    bits = np.ascontiguousarray(bits)
    for chunk in chunks(bits):
        groups, rest = split_groups(chunk)
        _, beyond = find_beyond(groups, EXACT)
        groups[beyond] = to_bfloat16(look_up(groups[beyond]))
        rest[:] = to_bfloat16(look_up(rest))
    return bits


def chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield views of the values, some after the other."""
    flat = values.reshape(-1)
    return (flat[start : start + CHUNK] for start in range(0, len(flat), CHUNK))


def cast_in_place(bits: np.ndarray) -> None:
    """Turn bfloat16's bits into float16's. Raises OverflowError.

    Where a value is in the normal range of float16, its exponent is counted from 15 in place of
    127, and its fraction has three bits more, which are zeros: but for the sign, the bits are eight
    times as many, less the difference of the exponents. Others are looked up.
    """
    groups, rest = split_groups(bits)
    rest[:] = look_up(rest)
    above, beyond = find_beyond(groups, NORMAL)
    others = look_up(groups[beyond])
    above *= 7
    groups += above
    groups -= NORMAL_BITS - (1 << FRACTION + 3)
    groups[beyond] = others


def split_groups(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return views of the bits: those in whole groups, a row each, and the rest."""
    n = len(bits) // GROUP * GROUP
    return bits[:n].reshape(-1, GROUP), bits[n:]


def find_beyond(groups: np.ndarray, exponents: range) -> tuple[np.ndarray, np.ndarray]:
    """Return how far bfloat16's bits are above the first of the exponents, but for the sign, and
    the indices of the groups in which one has another exponent.
    """
    above = groups & REST
    above -= exponents.start << FRACTION  # unsigned: what is below wraps around
    is_beyond = above >= len(exponents) << FRACTION
    return above, np.flatnonzero(is_beyond.view(np.uint64) != 0)


def look_up(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16's bits as float16's, whatever the values. Raises OverflowError."""
    half = every_float16()[bits]
    check_finite(half)
    return half


@lru_cache
def every_float16() -> np.ndarray:
    """Return float16's bits for each of bfloat16's."""
    bits = np.arange(2**16, dtype=np.uint32) << 16
    with np.errstate(over="ignore"):
        return bits.view(np.float32).astype(np.float16).view(np.uint16)


def to_bfloat16(half: np.ndarray) -> np.ndarray:
    """Return float16's bits as bfloat16's, which must hold the values."""
    return (half.view(np.float16).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def check_finite(bits: np.ndarray) -> None:
    """Raise OverflowError where one of the values, float16's bits, has the largest exponent."""
    if bits.size and (bits & REST).max() >= 0x7C00:
        raise OverflowError("values that are not finite in float16")
