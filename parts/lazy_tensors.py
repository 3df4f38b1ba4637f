"""Tensors that stay in their files until they are read, a few rows at a time; the files of
safetensors; the shards of a tensor joined.
"""

import json
import struct
from collections.abc import Callable, Container, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parts.files import check_content
from parts.float16 import round_to_float16, to_float16

BLOCK = 2**20  # values that are read at a time, if a row is not longer
NOT_PARAMETERS = ("rope.freqs", ".rotary_emb.inv_freq")  # in some checkpoints; the model has them
ITEM_TYPES = {  # of a tensor's values, as NumPy reads them: bfloat16 as its bits
    **{name: name for name in ("float64", "float32", "float16", "int64", "int32", "int16")},
    **{name: name for name in ("int8", "uint8", "uint16", "uint32", "uint64", "bool")},
    "bfloat16": "uint16",
}
SAFETENSORS_TYPES = {  # what .safetensors files call them
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "BF16": "bfloat16",
    "BOOL": "bool",
}


class LazyTensor(NamedTuple):
    """A tensor in a file, or a shard of one: its shape, its type, and a function that yields its
    rows in blocks, from the first to the last; bfloat16's values as their bits, uint16.
    """

    shape: tuple[int, ...]
    dtype: str
    blocks: Callable[[], Iterator[np.ndarray]]

    def read(self) -> np.ndarray:
        """Read all of it."""
        blocks = list(self.blocks())
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


class Weight(NamedTuple):
    """An array to write: its name, shape and type, and a function that yields its rows in blocks,
    from the first to the last. The rows of a head are never apart.

    dtype: a NumPy type's name, or bfloat16, whose blocks are the bits in 16-bit integers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        size = 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize
        return size * int(np.prod(self.shape))


Shards = dict[str, list[LazyTensor]]  # of each tensor; one, but for Meta's larger models


# -------------------------------------------------------------------------------------------------
# Opening


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Open the tensors of a .safetensors file. Raises ValueError when it is damaged.

    The format: https://github.com/huggingface/safetensors#format
    """
    check_content(path)
    try:
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            end = path.stat().st_size - 8 - size
            if end < 0:
                raise ValueError("it ends before its tensors")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        opened = {name: open_stored(path, 8 + size, end, **header[name]) for name in header}
        if end != max((stored["data_offsets"][1] for stored in header.values()), default=0):
            raise ValueError("its size is not that of its tensors")
    except Exception as error:  # a damaged file raises almost anything
        raise ValueError(f"{path} is damaged ({error})") from error
    return opened


def open_stored(
    path: Path, start: int, end: int, dtype: str, shape: list[int], data_offsets: list[int]
) -> LazyTensor:
    """Return a tensor of a .safetensors file, as its header describes it.

    start: of the tensors' bytes; end: how many these are. Raises ValueError where it is none.
    """
    first, last = data_offsets
    shape, dtype = tuple(map(int, shape)), SAFETENSORS_TYPES.get(dtype, dtype)
    item = np.dtype(ITEM_TYPES.get(dtype, "uint8"))
    size = int(np.prod(shape, dtype=object)) * item.itemsize
    if not 0 <= first <= last <= end or min(shape, default=0) < 0:
        raise ValueError("a tensor lies outside of it")
    if dtype in ITEM_TYPES and last - first != size:
        raise ValueError("a tensor has another size than its shape")
    return LazyTensor(shape, dtype, partial(read_blocks, path, start + first, shape, item))


def collect_shards(files: Iterable[dict[str, LazyTensor]]) -> Shards:
    """Return the shards of each tensor, in the order of the files that they are in, without what is
    no parameter.
    """
    tensors = {}
    for file in files:
        for name, shard in file.items():
            if not name.endswith(NOT_PARAMETERS):
                tensors.setdefault(name, []).append(shard)
    return tensors


# -------------------------------------------------------------------------------------------------
# Reading


def split_axis(name: str, shards: list[LazyTensor], shape: tuple[int, ...]) -> int | None:
    """Return the axis along which the shards are to be joined to `shape`, or None where each is the
    whole. Meta splits rows of some matrices and columns of others, and repeats the norms.

    Raises ValueError, which names the tensor, where they do not join.
    """
    if all(shard.shape == shape for shard in shards):
        return None
    if all(len(shard.shape) == len(shape) for shard in shards):
        for axis in range(len(shape)):
            joined = list(shards[0].shape)
            joined[axis] = sum(shard.shape[axis] for shard in shards)
            if tuple(joined) == shape:
                return axis
    stored = " and ".join(str(shard.shape) for shard in shards)
    raise ValueError(f"{name} has the shape {stored}, where the params imply {shape}")


def read_parameters(
    tensors: Shards, shapes: dict[str, tuple[int, ...]], as_stored: Container[str] = ()
) -> list[Weight]:
    """Return the parameters, in the order of `shapes`, as float16 that is read block by block. Of
    the names in `as_stored`, bfloat16 stays what it is, with its values rounded to float16.

    The blocks raise ValueError when a value is not finite in float16, or cannot be read.
    """
    weights = []
    for name, shape in shapes.items():
        dtypes = {shard.dtype for shard in tensors[name]}
        dtype = "bfloat16" if name in as_stored and dtypes == {"bfloat16"} else "float16"
        blocks = partial(read_parameter, name, tensors[name], shape, dtype)
        weights.append(Weight(name, shape, dtype, blocks))
    return weights


def read_parameter(
    name: str, shards: list[LazyTensor], shape: tuple[int, ...], dtype: str
) -> Iterator[np.ndarray]:
    """Yield the rows of a tensor of that shape, its shards joined, in blocks."""

    def blocks(shard: LazyTensor) -> Iterator[np.ndarray]:
        if dtype == "bfloat16":
            return map(round_to_float16, shard.blocks())
        return (to_float16(block, shard.dtype) for block in shard.blocks())

    axis = split_axis(name, shards, shape)
    try:
        for shard in shards:
            if "float" not in shard.dtype:
                raise TypeError(f"its values are {shard.dtype}, which are no weights")
        if axis:
            columns = [np.concatenate(list(blocks(shard))) for shard in shards]
            yield np.concatenate(columns, axis)
        else:
            yield from chain.from_iterable(map(blocks, shards[:1] if axis is None else shards))
    except OverflowError as error:
        raise ValueError(f"{name} holds {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name} cannot be read ({reason})") from error


def all_blocks(weights: Iterable[Weight]) -> Iterator[tuple[Weight, np.ndarray]]:
    """Yield the blocks of all weights, one after the other, each with its weight."""
    return ((weight, block) for weight in weights for block in weight.blocks())


def read_blocks(
    path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Yield the rows of an array in a file in blocks. start: of its first byte.

    Raises ValueError where the file ends before them.
    """
    row = max(1, int(np.prod(shape[1:])))
    n_rows = max(1, BLOCK // row)
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        for first in range(0, shape[0], n_rows):
            block = np.empty((min(n_rows, shape[0] - first), *shape[1:]), dtype)
            if file.readinto(memoryview(block).cast("B")) < block.nbytes:
                raise ValueError(f"{path} ends before its values")
            yield block
