"""A model's weights with an adapter merged in, some rows at a time.

A layer with LoRA computes `x Wᵀ + scale (x A) B` (Hu et al., 2021), so that the merged weight is
`W + scale (A B)ᵀ`. It is computed in float32 and rounded once. Weights in few bits are dequantized,
or quantized again if asked: what was learnt is small, and rounding to few bits loses part of it.

No array is ever whole in memory: the largest, an embedding, may be larger than all else together.
"""

import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts.lazy_tensors import Weight
from parts.pipeline import read_ahead

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

BLOCK = 2**20  # values that are in memory at a time, if heads of a row are not larger
LOCAL_HEADER = struct.Struct("<26x2H")  # before a zip's member: the sizes of its name and extras
QUANTIZED = ("weight", "scales", "biases")  # the arrays of a quantized layer


class Update(NamedTuple):
    """The LoRA matrices of a layer: a (in, rank) and b (rank, out), float32, and their factor."""

    a: np.ndarray
    b: np.ndarray
    scale: float


# -------------------------------------------------------------------------------------------------
# Read


def open_weights(path: Path, head_dim: int) -> dict[str, Weight]:
    """Return the arrays of a `weights.npz` by name, in the file's order.

    Raises ValueError where the file is damaged; the blocks raise it where an array is.
    """
    weights = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                with archive.open(member) as file:
                    shape, dtype = read_header(file)
                    start = file.tell()
                name = member.filename.removesuffix(".npy")
                read = partial(read_blocks, path, member, start, shape, dtype, head_dim)
                weights[name] = Weight(name, shape, dtype.name, read)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): run convert.py") from error
    return weights


def read_header(file: zipfile.ZipExtFile) -> tuple[tuple[int, ...], np.dtype]:
    """Read the head of a `.npy` member. Raises ValueError where it is none of convert.py's, and of
    fuse.py's.
    """
    np.lib.format.read_magic(file)
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    if by_columns or dtype not in (np.float16, np.float32, np.uint32):
        raise ValueError(f"an array of {dtype} that convert.py did not write")
    return shape, dtype


def read_blocks(
    path: Path,
    member: zipfile.ZipInfo,
    start: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    head_dim: int,
) -> Iterator[np.ndarray]:
    """Yield the rows of a member in blocks, of whole heads; the next is read while one is in use.
    Its place in the archive is read directly, which saves the copies that `zipfile` makes.

    start: of the array in the member. Raises ValueError where the checksum tells of damage.
    """
    row = int(np.prod(shape[1:]))
    n_rows = shape[0] if len(shape) < 2 else max(1, BLOCK // row // head_dim) * head_dim

    def read() -> Iterator[np.ndarray]:
        with open(path, "rb", buffering=0) as file:
            file.seek(member.header_offset)
            head = file.read(LOCAL_HEADER.size)
            file.seek(sum(LOCAL_HEADER.unpack(head)[-2:]), os.SEEK_CUR)
            checksum = zlib.crc32(file.read(start))
            for first in range(0, shape[0], n_rows):
                block = np.empty((min(n_rows, shape[0] - first), *shape[1:]), dtype)
                n_read = file.readinto(memoryview(block).cast("B"))
                checksum = zlib.crc32(block, checksum)
                if n_read != block.nbytes:
                    break
                yield block
            if checksum != member.CRC:
                name = member.filename.removesuffix(".npy")
                raise ValueError(f"{name} in {path} is damaged: run convert.py")

    return read_ahead(read())


# -------------------------------------------------------------------------------------------------
# Fuse


def fuse(
    weights: dict[str, Weight],
    updates: dict[str, Update],
    quantization: dict | None,
    keep_quantized: bool = False,
) -> list[Weight]:
    """Return the weights of the model with the updates merged in.

    weights: as stored; updates: of the adapted layers, by path; quantization: group_size and bits
    of a quantized model. Layers are dequantized, unless they are to be kept so: then only the
    adapted ones change.
    """
    fused = []
    for name, weight in weights.items():
        path, _, kind = name.rpartition(".")
        update = updates.get(path) if kind in QUANTIZED else None
        if f"{path}.scales" not in weights or kind not in QUANTIZED:
            fused.append(weight if update is None else add_update(weight, update))
        elif keep_quantized and update is None:
            fused.append(weight)
        elif kind == "weight":
            layer = [weights[f"{path}.{part}"] for part in QUANTIZED]
            whole = dequantize(layer, quantization)
            whole = whole if update is None else add_update(whole, update)
            fused += quantize(whole, layer, quantization) if keep_quantized else [whole]
    return fused


def add_update(weight: Weight, update: Update) -> Weight:
    """Return the weight (out, in) with an update merged in, float32."""

    a, b = (torch.from_numpy(np.array(matrix)) for matrix in (update.a, update.b))

    def blocks() -> Iterator[np.ndarray]:
        start = 0
        for block in weight.blocks():
            columns = b[:, start : start + len(block)]
            values = torch.from_numpy(block).float()
            yield values.addmm_(columns.T, a.T, alpha=update.scale).numpy()
            start += len(block)

    return weight._replace(dtype="float32", blocks=blocks)


def dequantize(layer: list[Weight], quantization: dict) -> Weight:
    """Return the weight (out, in) of a quantized layer, float32.

    layer: its packed weights (uint32), scales and biases.
    """

    def blocks() -> Iterator[np.ndarray]:
        for packed, scales, biases in zip_rows(layer):
            floats = (mx.array(values).astype(mx.float32) for values in (scales, biases))
            yield np.array(mx.dequantize(mx.array(packed), *floats, **quantization))

    n_rows, n_groups = layer[1].shape
    shape = (n_rows, n_groups * quantization["group_size"])
    return Weight(layer[0].name, shape, "float32", blocks)


def zip_rows(layer: list[Weight]) -> Iterator[list[np.ndarray]]:
    """Yield blocks of several arrays of the same number of rows: the same rows of each."""
    streams = [weight.blocks() for weight in layer]
    waiting = [next(stream) for stream in streams]
    while True:
        n_rows = min(map(len, waiting))
        yield [block[:n_rows] for block in waiting]
        for i, block in enumerate(waiting):
            waiting[i] = block[n_rows:] if len(block) > n_rows else next(streams[i], None)
        if any(block is None for block in waiting):
            return


def quantize(weight: Weight, layer: list[Weight], quantization: dict) -> list[Weight]:
    """Return the packed weights, scales and biases of a weight, in the form of `layer`."""

    @lru_cache(maxsize=1)
    def parts() -> list[np.ndarray]:
        blocks = (mx.quantize(mx.array(b), **quantization) for b in cast(weight).blocks())
        pieces = zip(*([np.array(part) for part in block] for block in blocks), strict=True)
        return [np.concatenate(arrays) for arrays in pieces]

    def blocks_of(i: int) -> Callable[[], Iterator[np.ndarray]]:
        def blocks() -> Iterator[np.ndarray]:
            yield parts()[i]
            if i == len(layer) - 1:
                parts.cache_clear()

        return blocks

    return [part._replace(blocks=blocks_of(i)) for i, part in enumerate(layer)]


# -------------------------------------------------------------------------------------------------
# Convert


def cast(weight: Weight, dtype: str = "float16") -> Weight:
    """Return a weight as float32, float16 or bfloat16; packed integers stay as they are.

    The blocks raise ValueError where a value is not finite in that type.
    """
    if weight.dtype == "uint32" or weight.dtype == dtype != "float32":  # float32: of a computation
        return weight

    kind = getattr(torch, dtype)

    def blocks() -> Iterator[np.ndarray]:
        for block in read_ahead(weight.blocks()):  # which may take as long to compute
            rounded = torch.from_numpy(block).to(kind)
            if not all(map(torch.isfinite, torch.aminmax(rounded))):
                raise ValueError(not_finite(weight.name, dtype))
            yield (rounded.view(torch.int16) if dtype == "bfloat16" else rounded).numpy()

    return weight._replace(dtype=dtype, blocks=blocks)


def not_finite(name: str, dtype: str) -> str:
    """What to say of a weight that a type cannot hold."""
    remedy = "" if dtype in ("bfloat16", "float32") else ", or give --dtype bfloat16"
    return (
        f"{name} holds values that are not finite in {dtype}: train with a smaller "
        f"--learning-rate{remedy}"
    )


def half_split(weight: Weight, head_dim: int) -> Weight:
    """Return the weight with the rows of each head in half-split order: the first of each pair of
    channels that RoPE rotates, then the second ones. Ours are pairs of neighbours.
    """

    def blocks() -> Iterator[np.ndarray]:
        for block in weight.blocks():
            pairs = block.reshape(-1, head_dim // 2, 2, *block.shape[1:])
            yield np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(block.shape)

    return weight._replace(blocks=blocks)


def rotated(name: str) -> bool:
    """Whether RoPE rotates the rows of this array: they are in another order elsewhere."""
    return name.split(".")[-2] in ("wq", "wk", "q_norm", "k_norm")


def total_bytes(weights: Iterable[Weight]) -> int:
    """The size of the weights in bytes."""
    return sum(weight.nbytes for weight in weights)


def merge(model: nn.Module, fused: Iterable[Weight], updates: Iterable[str]) -> None:
    """Put the merged weights in the place of the layers with LoRA, in a model that is loaded.

    updates: the paths of these layers.
    """
    arrays = {weight.name: weight for weight in fused}
    modules = dict(model.named_modules())
    dtype = model.norm.weight.dtype
    for path in updates:
        layer, bias = modules[path].linear, modules[path].linear.get("bias")
        if "scales" in layer and f"{path}.scales" not in arrays:
            layer = nn.Linear(1, 1, bias is not None)
            layer.update({} if bias is None else {"bias": bias})
        for name in QUANTIZED:
            weight = arrays.get(f"{path}.{name}")
            if weight is not None:
                value = mx.array(np.concatenate(list(cast(weight).blocks())))
                layer[name] = value if value.dtype == mx.uint32 else value.astype(dtype)
        model.update_modules(tree_unflatten([(path, layer)]))
