"""The files of torch, read without it: importing torch takes longer than a small conversion.

A zip archive: `data.pkl`, a pickle of the object, and each storage as a member of its own, not
compressed. Or, before torch 1.6, five pickles (a magic number, a version, the machine, the object,
the keys of the storages), then each storage in the order of the keys, as the number of its values
and their bytes. The values stay in the file until they are asked for, a few rows at a time. The
pickles may name nothing but tensors: a file never gets to run code.
"""

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from parts.files import check_content
from parts.lazy_tensors import ITEM_TYPES, LazyTensor, read_blocks

DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # what the files before 1.6 begin with
LOCAL_HEADER = struct.Struct("<26x2H")  # before a zip's member: the sizes of its name and extras


class Storage(NamedTuple):
    """Values that tensors are views of."""

    key: str
    dtype: str
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


# -------------------------------------------------------------------------------------------------
# Opening


def open_torch(path: Path) -> dict[str, LazyTensor]:
    """Open the tensors of a file of torch's. No code of the file is run.

    Raises ValueError when it is damaged, or holds anything else.
    """
    check_content(path)
    try:
        state, places = (open_legacy if is_legacy(path) else open_archive)(path)
        for name, tensor in state.items():
            first, last = values_of(tensor)
            if not 0 <= first <= last < places[tensor.storage.key].n_values:
                raise ValueError(f"{name} lies outside of its storage")
    except Exception as error:  # a damaged file raises almost anything
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is damaged, or holds more than tensors ({reason})") from error
    return {
        name: LazyTensor(
            tensor.shape,
            tensor.storage.dtype,
            partial(read_tensor, path, places[tensor.storage.key], tensor),
        )
        for name, tensor in state.items()
    }


def is_legacy(path: Path) -> bool:
    """Whether torch before 1.6 wrote this file."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_archive(path: Path) -> tuple[dict[str, Tensor], dict[str, Place]]:
    """Return the tensors of a zip archive, and the places of their storages. Raises whatever a
    damaged one does, or ValueError.
    """
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        members = {m.filename.partition("/")[2]: m for m in archive.infolist()}
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise ValueError("its bytes are in big-endian order")
        with archive.open(members["data.pkl"]) as pickled:
            state = check_state(TensorUnpickler(pickled, encoding="utf-8").load())
        places = {}
        for tensor in state.values():
            key, size = tensor.storage.key, np.dtype(ITEM_TYPES[tensor.storage.dtype]).itemsize
            member = members[f"data/{key}"]
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError("its tensors are compressed")
            file.seek(member.header_offset)
            head = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
            places[key] = Place(file.tell() + sum(head), member.file_size // size)
    return state, places


def open_legacy(path: Path) -> tuple[dict[str, Tensor], dict[str, Place]]:
    """As `open_archive`, of a file that torch before 1.6 wrote."""
    with open(path, "rb") as file:
        for _ in range(3):
            TensorUnpickler(file).load()
        state = check_state(TensorUnpickler(file, encoding="utf-8").load())
        keys = TensorUnpickler(file).load()
        dtypes = {tensor.storage.key: tensor.storage.dtype for tensor in state.values()}
        return state, find_storages(file, {key: dtypes[key] for key in keys})


def check_state(state: object) -> dict[str, Tensor]:
    """Return what was unpickled. Raises ValueError where it is anything but tensors by name."""
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise ValueError("it does not hold tensors by name")
    return state


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
        _, dtype, key, _, _, *view = identity  # the last in files before 1.6 alone
        return Storage(key, dtype, view[0][1] if view and view[0] else 0)


def find_storages(file: BinaryIO, dtypes: dict[str, str]) -> dict[str, Place]:
    """Where the values of each storage are. Raises ValueError when the file ends before them."""
    size = os.fstat(file.fileno()).st_size
    places, end = {}, file.tell()
    for key, dtype in dtypes.items():
        file.seek(end)
        (n_values,) = struct.unpack("<q", file.read(8))
        places[key] = Place(file.tell(), n_values)
        end = places[key].start + max(n_values, 0) * np.dtype(ITEM_TYPES[dtype]).itemsize
    if end > size:
        raise ValueError(f"it has {size} of {end} bytes")
    return places


# -------------------------------------------------------------------------------------------------
# Reading


def values_of(tensor: Tensor) -> tuple[int, int]:
    """The first and the last of the values that the tensor takes from its storage."""
    first = tensor.storage.offset + tensor.offset
    steps = zip(tensor.shape, tensor.strides, strict=True)
    return first, first + sum((n - 1) * stride for n, stride in steps)


def read_tensor(path: Path, place: Place, tensor: Tensor) -> Iterator[np.ndarray]:
    """Yield the tensor's values, and nothing else of the file, as `LazyTensor.blocks` does."""
    dtype, (first, last) = np.dtype(ITEM_TYPES[tensor.storage.dtype]), values_of(tensor)
    start, size = place.start + first * dtype.itemsize, last - first + 1
    rows = np.cumprod((1, *tensor.shape[:0:-1]))[::-1]  # the strides of rows that follow each other
    if tensor.strides == tuple(rows):
        yield from read_blocks(path, start, tensor.shape, dtype)
        return
    (values,) = read_blocks(path, start, (1, size), dtype)
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    yield np.lib.stride_tricks.as_strided(values, tensor.shape, strides)
