"""The adapter: its file, adapters.npz, and its matrices as one vector.

The file holds the LoRA matrices and nothing else, float32, under their parameter paths in the model
(`layers.24.attention.wq.lora_a`), as `numpy.savez` writes them. Layers, projections and rank are
the file's own, by its keys and shapes. A scale other than 2.0 is in the archive's comment, as JSON,
which readers of NumPy's format pass over: `{"scale": 4.0}`.
"""

import argparse
import io
import json
import os
import re
import reprlib
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts.cli import warn
from parts.files import check_content, is_safetensors, partial_file
from parts.run_files import find_siblings, sibling

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

KEY = re.compile(r"layers\.(0|[1-9]\d{0,3})\.([a-z_]\w*(?:\.\w+)*)\.lora_[ab]")
PROJECTIONS = {  # the linear layers of a transformer block, and where in it they are
    **dict.fromkeys(("wq", "wk", "wv", "wo"), "attention"),
    **dict.fromkeys(("w1", "w2", "w3"), "feed_forward"),
}
LORA_SCALE = 2.0  # of a file that does not tell its scale
MAX_SCALE = 1e4  # as of --lora-scale
FOREIGN_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth")  # of other tools' formats


# -------------------------------------------------------------------------------------------------
# Read


def parse_adapter(content: bytes, path: str | Path) -> dict[str, np.ndarray]:
    """Return the LoRA matrices (float32) of an adapter file's content, by parameter path.

    Raises ValueError, which names `path`, when it is damaged or holds anything else.
    """
    try:
        with np.load(io.BytesIO(content)) as archive:
            matrices = {name: archive[name] for name in archive.files}
    except Exception as error:  # a damaged archive raises almost anything
        raise ValueError(f"{path} is no adapter file ({error}): make one with --train") from error
    for name, matrix in matrices.items():
        if not KEY.fullmatch(name):
            raise ValueError(f"{path} holds {name}, which is no LoRA matrix")
        matrices[name] = check_matrix(name, matrix, path)
    if not matrices:
        raise ValueError(f"{path} holds no LoRA matrices: make them with --train")
    return matrices


def check_matrix(name: str, matrix: np.ndarray, path: str | Path) -> np.ndarray:
    """Return a matrix as float32. Raises ValueError, which names it, where it is none, or empty, or
    not finite.
    """
    if matrix.ndim != 2 or not np.issubdtype(matrix.dtype, np.floating):
        raise ValueError(f"{name} in {path} is not a matrix of floats")
    with np.errstate(over="ignore"):
        matrix = matrix.astype(np.float32)
    if not matrix.size:
        raise ValueError(f"{name} in {path} is empty: train again")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} in {path} is not finite: train again")
    return matrix


def read_adapter(path: str | Path) -> dict[str, np.ndarray]:
    """Return the LoRA matrices (float32) of an adapter file, by parameter path.

    Raises OSError, or ValueError when the file is damaged or holds anything else.
    """
    return parse_adapter(Path(path).read_bytes(), path)


def parse_scale(content: bytes, path: str | Path) -> float:
    """Return the scale that an adapter file's content tells, or the one that goes without saying.

    Raises ValueError, which names `path`, when it is none.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        comment = archive.comment
    try:
        settings = json.loads(comment or b"{}")
    except (ValueError, RecursionError):  # another tool's words
        return LORA_SCALE
    scale = settings.get("scale", LORA_SCALE) if isinstance(settings, dict) else LORA_SCALE
    return check_scale(scale, path)


def check_scale(scale: object, path: str | Path) -> float:
    """Return a scale that a file tells. Raises ValueError, which names `path`, where it is none."""
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not is_number or not 0 < scale <= MAX_SCALE:
        raise ValueError(
            f"the scale in {path} is {reprlib.repr(scale)}, and not a number above 0 and up to "
            f"{MAX_SCALE:g}"
        )
    return float(scale)


def adapted_layers(
    matrices: dict[str, np.ndarray], n_layers: int, path: str | Path
) -> list[tuple[list[int], list[str], int]]:
    """Return what of a model the matrices adapt: layers, and of these the projections and their
    rank. Where layers differ, there are several such groups.

    Raises ValueError where the model, of `n_layers` layers, has too few, or no such projection.
    """
    layers_of = defaultdict(set)  # by projection and rank
    for name, matrix in matrices.items():
        layer, module = KEY.fullmatch(name).groups()
        block, _, projection = module.rpartition(".")
        if PROJECTIONS.get(projection) != block:
            raise ValueError(
                f"{path} holds {name}, which is no LoRA matrix of {', '.join(PROJECTIONS)}"
            )
        if int(layer) >= n_layers:
            raise ValueError(
                f"{path} adapts layer {layer} of a model that has {n_layers} layers: "
                "use the model that it was trained on"
            )
        if name.endswith("lora_a"):
            layers_of[projection, matrix.shape[1]].add(int(layer))
    projections_of = defaultdict(list)  # by layers and rank
    for (projection, rank), layers in layers_of.items():
        projections_of[tuple(sorted(layers)), rank].append(projection)
    return [(list(layers), names, rank) for (layers, rank), names in projections_of.items()]


def put_matrices(model: nn.Module, matrices: dict[str, np.ndarray], path: str | Path) -> None:
    """Put the matrices in the place of those that the model trains.

    Raises ValueError, which names the file and the key, when they do not fit.
    """
    expected = dict(tree_flatten(model.trainable_parameters()))
    for name in matrices:
        if name not in expected:  # its lora_a decides what the model trains
            pair = name.removesuffix("lora_b") + "lora_a"
            raise ValueError(f"{path} lacks {pair}: the file is not whole, train again")
    for name in expected:
        if name not in matrices:
            raise ValueError(f"{path} lacks {name}: the file is not whole, train again")
        if matrices[name].shape != expected[name].shape:
            raise ValueError(
                f"{name} in {path} has the shape {matrices[name].shape}, the model needs "
                f"{expected[name].shape}: use the model that it was trained on"
            )
    model.update(tree_unflatten([(name, mx.array(value)) for name, value in matrices.items()]))


# -------------------------------------------------------------------------------------------------
# Check, before anything is loaded


def check_adapter(adapter: str | Path) -> None:
    """Raise ValueError where an adapter file, or its state, is of another kind than lora.py's."""
    for path in (Path(adapter), sibling(adapter, ".state.npz")):
        if path.is_file():
            check_content(path)
    if is_safetensors(adapter):
        raise ValueError(
            f"{adapter} is a safetensors file, as PEFT's and mlx-lm's adapters are: name the "
            "folder with it and adapter_config.json, or the .npz file that lora.py --train wrote"
        )


def check_replaceable(adapter: Path) -> None:
    """Raise ValueError, FileNotFoundError or IsADirectoryError where training cannot write this
    file, or should not: what the suite did not make, it does not replace.
    """
    folder = partial_file(adapter).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder of --adapter-file {adapter} does not exist")
    if adapter.is_dir():
        raise IsADirectoryError(
            f"--adapter-file {adapter} is a folder: name a file to write; to start from another "
            "library's adapter, give its folder as --resume-adapter-file"
        )
    if adapter.suffix in FOREIGN_SUFFIXES:
        raise ValueError(
            f"--adapter-file {adapter}: training writes NumPy's format: name {adapter.stem}.npz"
        )
    if not os.access(folder, os.W_OK):
        raise ValueError(f"nothing can be written into the folder of --adapter-file {adapter}")
    if adapter.exists() and not holds_adapters(adapter):
        raise ValueError(f"--adapter-file {adapter} exists and holds no adapters: name another")
    find_siblings(adapter)


def holds_adapters(path: Path) -> bool:
    """Whether this is an adapter file, or an empty file."""
    if not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return all(KEY.fullmatch(name.removesuffix(".npy")) for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return path.stat().st_size == 0


# -------------------------------------------------------------------------------------------------
# Write


def to_numpy(tree: dict) -> dict[str, np.ndarray]:
    """Return a tree of arrays as NumPy's (float32), by parameter path. Waits for them."""
    return {name: np.array(value, np.float32) for name, value in tree_flatten(tree)}


def write_adapter(
    file: BinaryIO, matrices: dict[str, np.ndarray], scale: float = LORA_SCALE
) -> None:
    """Write the matrices, and their scale, into an open file, in NumPy's format. Raises OSError."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, matrix in matrices.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, matrix)
        if scale != LORA_SCALE:
            archive.comment = json.dumps({"scale": scale}).encode()


def scale_of(model: nn.Module) -> float:
    """Return the scale of the model's LoRA matrices, which is the same for all."""
    return next((m.scale for m in model.modules() if "lora_a" in m), LORA_SCALE)


def adapted_projections(model: nn.Module) -> list[tuple[int, str, int]]:
    """Return layer, name and rank of each projection that is adapted."""
    return [
        (i, name, layer[block][name].lora_a.shape[1])
        for i, layer in enumerate(model.layers)
        for name, block in PROJECTIONS.items()
        if "lora_a" in layer[block][name]
    ]


def describe_lora(model: nn.Module) -> str:
    """Return what of the model is adapted: "rank 8 in wq wv of 16 of 32 layers"."""
    layers, names, ranks = map(set, zip(*adapted_projections(model), strict=True))
    names = [name for name in PROJECTIONS if name in names]
    scale = scale_of(model)
    times = f" times {scale:g}" if scale != LORA_SCALE else ""
    return (
        f"rank {' and '.join(map(str, sorted(ranks)))}{times} in {' '.join(names)} of "
        f"{len(layers)} of {len(model.layers)} layers"
    )


def warn_of_flags(model: nn.Module, args: argparse.Namespace) -> None:
    """Warn where a run begins from adapters that are not what its flags describe: they stay."""
    settings = {(name, rank) for _, name, rank in adapted_projections(model)}
    asked = {(name, args.lora_rank) for name in args.lora_projections}
    if settings != asked or scale_of(model) != args.lora_scale:
        warn(
            f"{args.resume_adapter_file} decides what is adapted, rather than --lora-projections, "
            f"--lora-rank and --lora-scale: {describe_lora(model)}"
        )


# -------------------------------------------------------------------------------------------------
# As one vector: to update many small matrices costs as much as one


def to_vector(tree: dict) -> mx.array:
    """Return all values of a tree of arrays as one vector."""
    return mx.concatenate([value.flatten() for _, value in tree_flatten(tree)])


def from_vector(vector: mx.array, tree: dict) -> dict:
    """Return a tree of the shapes of `tree`, with the values of a vector of `to_vector`."""
    leaves = tree_flatten(tree)
    ends = np.cumsum([value.size for _, value in leaves]).tolist()
    values = zip(leaves, mx.split(vector, ends[:-1]), strict=True)
    return tree_unflatten([(name, part.reshape(value.shape)) for (name, value), part in values])
