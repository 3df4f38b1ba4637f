"""Tensors that stay in the files of torch and safetensors until they are read, one at a time; and
the shards of one joined.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from parts.files import check_content
from parts.legacy_torch import is_legacy, open_legacy

NOT_PARAMETERS = ("rope.freqs", ".rotary_emb.inv_freq")  # in some checkpoints; the model has them


class LazyTensor(NamedTuple):
    """A tensor in a file, or a shard of one: its shape, and a function that reads it.

    The function opens the file each time: the pages of one that stays mapped into memory would add
    up to the whole checkpoint.
    """

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


Shards = dict[str, list[LazyTensor]]  # of each tensor; one, but for Meta's larger models


# -------------------------------------------------------------------------------------------------
# Opening


def open_torch(path: Path) -> dict[str, LazyTensor]:
    """Open the tensors of a file of torch's. No code of the file is run (`weights_only`).

    Raises ValueError when it is damaged, or holds anything else.
    """

    def load() -> dict[str, torch.Tensor]:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)

    check_content(path)
    try:
        if is_legacy(path):
            return {name: LazyTensor(*tensor) for name, tensor in open_legacy(path).items()}
        state = load()
    except Exception as error:  # a damaged archive raises almost anything
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is damaged, or holds more than tensors ({reason})") from error
    names_tensors = isinstance(state, dict) and all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in state.items()
    )
    if not names_tensors:
        raise ValueError(f"{path} does not hold tensors by name")
    return {
        name: LazyTensor(tuple(tensor.shape), lambda name=name: load()[name].detach())
        for name, tensor in state.items()
    }


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Open the tensors of a .safetensors file. Raises ValueError when it is damaged."""

    def read(name: str) -> torch.Tensor:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    check_content(path)
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    return {name: LazyTensor(shape, lambda name=name: read(name)) for name, shape in shapes.items()}


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
    tensors: Shards, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the float16 array of each parameter, in the order of `shapes`. The next
    one is read while one is in use.

    Raises ValueError when a value is not finite in float16, or cannot be read.
    """
    return prefetch((name, read_float16(name, tensors[name], shapes[name])) for name in shapes)


def read_float16(name: str, shards: list[LazyTensor], shape: tuple[int, ...]) -> np.ndarray:
    """Read a tensor of that shape, its shards joined, as float16."""
    axis = split_axis(name, shards, shape)
    try:
        read = [shard.read() for shard in (shards[:1] if axis is None else shards)]
        for tensor in read:
            if not tensor.is_floating_point():
                raise TypeError(f"its values are {tensor.dtype}, which are no weights")
        half = (read[0] if axis is None else torch.cat(read, axis)).to(torch.float16)
        array = half.numpy()
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name} cannot be read ({reason})") from error
    if not all(map(torch.isfinite, torch.aminmax(half))):
        raise ValueError(f"{name} holds values that are not finite in float16")
    return array


def prefetch(items: Iterable) -> Iterator:
    """Yield the items, each made in a thread while the one before it is in use."""
    items = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        item = coming.result()
        while item is not None:
            coming = pool.submit(next, items, None)
            yield item
            item = coming.result()
