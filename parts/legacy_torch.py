"""The files of torch before 1.6: five pickles (a magic number, a version, the machine, the object,
the keys of the storages), then each storage in the order of the keys, as the number of its values
and their bytes.

`torch.load` reads them only as a whole. Here a tensor is read when it is asked for, so that one at
a time is in memory. The pickles may name nothing but tensors: a file never gets to run code.
"""

import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # what these files begin with


class Storage(NamedTuple):
    """Values that tensors are views of."""

    key: str
    dtype: torch.dtype
    offset: int  # values before its own, where it is itself a view


class Place(NamedTuple):
    """Where a storage is in the file: its first byte, and how many values follow."""

    start: int
    n_values: int


class Tensor(NamedTuple):
    """A tensor whose values are still in the file."""

    storage: Storage
    offset: int  # in values, as strides are
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TensorUnpickler(pickle.Unpickler):
    """Reads a pickle of nothing but tensors. Raises pickle.UnpicklingError for anything else."""

    def find_class(self, module: str, name: str) -> object:
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, strides, *_: (
                Tensor(storage, offset, tuple(shape), tuple(strides))
            ),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no tensor")

    def persistent_load(self, identity: tuple) -> Storage:
        _, dtype, key, _, _, view = identity
        return Storage(key, dtype, view[1] if view else 0)


def is_legacy(path: Path) -> bool:
    """Whether torch before 1.6 wrote this file."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_legacy(path: Path) -> dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]]:
    """The shape of each tensor of the file, and a function that reads it. Raises whatever a
    damaged pickle does, or ValueError.
    """
    with open(path, "rb") as file:
        for _ in range(3):
            TensorUnpickler(file).load()
        state = TensorUnpickler(file, encoding="utf-8").load()
        keys = TensorUnpickler(file).load()
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
        ):
            raise ValueError("it does not hold tensors by name")
        dtypes = {tensor.storage.key: tensor.storage.dtype for tensor in state.values()}
        storages = find_storages(file, {key: dtypes[key] for key in keys})
    for name, tensor in state.items():
        first, last = values_of(tensor)
        if not 0 <= first <= last < storages[tensor.storage.key].n_values:
            raise ValueError(f"{name} lies outside of its storage")
    return {
        name: (tensor.shape, lambda tensor=tensor: read(path, storages, tensor))
        for name, tensor in state.items()
    }


def find_storages(file: BinaryIO, dtypes: dict[str, torch.dtype]) -> dict[str, Place]:
    """Where the values of each storage are. Raises ValueError when the file ends before them."""
    size = os.fstat(file.fileno()).st_size
    places, end = {}, file.tell()
    for key, dtype in dtypes.items():
        file.seek(end)
        (n_values,) = struct.unpack("<q", file.read(8))
        places[key] = Place(file.tell(), n_values)
        end = places[key].start + max(n_values, 0) * dtype.itemsize
    if end > size:
        raise ValueError(f"it has {size} of {end} bytes")
    return places


def values_of(tensor: Tensor) -> tuple[int, int]:
    """The first and the last of the values that the tensor takes from its storage."""
    first = tensor.storage.offset + tensor.offset
    steps = zip(tensor.shape, tensor.strides, strict=True)
    return first, first + sum((n - 1) * stride for n, stride in steps)


def read(path: Path, storages: dict[str, Place], tensor: Tensor) -> torch.Tensor:
    """Read the tensor's values, and nothing else of the file."""
    dtype, (first, last) = tensor.storage.dtype, values_of(tensor)
    values = bytearray((last - first + 1) * dtype.itemsize)
    with open(path, "rb") as file:
        file.seek(storages[tensor.storage.key].start + first * dtype.itemsize)
        if file.readinto(values) < len(values):
            raise ValueError(f"{path} ends before its values")
    return torch.frombuffer(values, dtype=dtype).as_strided(tensor.shape, tensor.strides)
