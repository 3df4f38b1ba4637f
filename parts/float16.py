"""The values of a checkpoint as float16.

torch casts well, but importing it takes longer than to convert a small model: here NumPy casts
bfloat16, and torch what few checkpoints still hold.
"""

import numpy as np

CHUNK = 2**17  # values that are cast at a time: the processor's cache holds them
SIGN, REST = 0x8000, 0x7FFF  # of the bits of both types
SMALLEST, N_NORMAL = 113 << 7, 30 << 7  # bfloat16's bits of 2**-14, and how many up to 2**16
GROUP = 8  # neighbours that are cast with care where one of them needs it


def to_float16(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return the values as float16, rounded to the nearest.

    dtype: of the values, a float; bfloat16's are their bits, uint16, which are overwritten.
    Raises OverflowError where one is not finite in float16.
    """
    values = np.ascontiguousarray(values)
    if dtype == "bfloat16":
        flat = values.reshape(-1)
        for start in range(0, len(flat), CHUNK):
            cast_in_place(flat[start : start + CHUNK])
        return values.view(np.float16)
    if dtype != "float16":
        import torch

        values = torch.from_numpy(values).to(torch.float16).numpy()
    check_finite(values.view(np.uint16))
    return values


def round_to_float16(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return the values as `to_float16` does, but where they are bfloat16 as float32: MLX computes
    with that in less time.
    """
    if dtype != "bfloat16":
        return to_float16(values, dtype)
    wide = np.empty(values.shape, np.float32)
    flat, bits = wide.reshape(-1), np.ascontiguousarray(values).reshape(-1)
    for start in range(0, len(flat), CHUNK):
        round_chunk(bits[start : start + CHUNK], flat[start : start + CHUNK])
    return wide


def cast_in_place(bits: np.ndarray) -> None:
    """Turn bfloat16's bits into float16's. Raises OverflowError.

    Where a value is in the normal range of float16, its exponent is counted from 15 in place of
    127, and its fraction has three bits more, which are zeros. Others are cast one by one.
    """
    groups, rest = split_groups(bits)
    rest[:] = cast_with_care(rest)
    beyond = find_beyond(groups)
    others = cast_with_care(groups[beyond])
    half = groups & REST
    half *= 8
    half -= (127 - 15 << 10) & 0xFFFF
    groups &= SIGN
    groups |= half
    groups[beyond] = others


def round_chunk(bits: np.ndarray, wide: np.ndarray) -> None:
    """Write bfloat16's values into `wide`, float32, rounded to float16. Raises OverflowError."""
    np.left_shift(bits, 16, out=wide.view(np.uint32), dtype=np.uint32)
    (groups, rest), (wide_groups, wide_rest) = split_groups(bits), split_groups(wide)
    beyond = find_beyond(groups)
    wide_groups[beyond] = cast_with_care(groups[beyond]).view(np.float16)
    wide_rest[:] = cast_with_care(rest).view(np.float16)


def split_groups(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return views of the values: those in whole groups, a row each, and the rest."""
    n = len(values) // GROUP * GROUP
    return values[:n].reshape(-1, GROUP), values[n:]


def find_beyond(groups: np.ndarray) -> np.ndarray:
    """Return the indices of the groups of which a value is no normal one of float16."""
    is_beyond = ((groups & REST) - SMALLEST) >= N_NORMAL  # unsigned: what is smaller wraps around
    return np.flatnonzero(is_beyond.view(np.uint64) != 0)


def cast_with_care(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16's bits as float16's, whatever the values. Raises OverflowError."""
    with np.errstate(over="ignore"):
        half = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float16).view(np.uint16)
    check_finite(half)
    return half


def check_finite(bits: np.ndarray) -> None:
    """Raise OverflowError where one of the values, float16's bits, has the largest exponent."""
    if bits.size and (bits & REST).max() >= 0x7C00:
        raise OverflowError("values that are not finite in float16")
