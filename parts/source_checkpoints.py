"""Checkpoints of Llama, Mistral and Qwen in Meta's, Mistral's and Hugging Face's layouts, read
under Meta's names, one tensor at a time.

layout          weights                                             shape of the model
Meta's          consolidated.00.pth, consolidated.01.pth, ...       params.json
Mistral's       consolidated.safetensors                            params.json
Hugging Face's  model*.safetensors or pytorch_model*.bin            config.json

Meta splits its larger models into shards: each file has some rows or columns of every tensor.
Hugging Face's files have some tensors each, whole, under other names, and the rows of wq and wk in
another order (see `parts.hugging_face`). All layouts of one model convert to equal bytes.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parts.cli import did_you_mean
from parts.files import find_file, read_json
from parts.hugging_face import DEFAULTS, from_hugging_face
from parts.lazy_tensors import (
    LazyTensor,
    Shards,
    collect_shards,
    open_safetensors,
    split_axis,
)
from parts.params_json import params_of
from parts.torch_files import open_torch
from parts.unsupported import check_config, check_folder, check_params, check_tensor_names


class Checkpoint(NamedTuple):
    """What a folder holds: the file that describes the model, the values of `ModelArgs` that it
    gives, the tensors under Meta's names, and Hugging Face's config.json, None where it has none.
    """

    source: Path
    params: dict
    tensors: Shards
    config: dict | None


# -------------------------------------------------------------------------------------------------
# Layouts


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the checkpoint in a folder, in whichever layout.

    Raises FileNotFoundError, or ValueError when the files are damaged or of another architecture.
    """
    checkpoint = open_meta(folder) or open_mistral(folder) or open_hugging_face(folder)
    if checkpoint is None:
        check_folder(folder)
        raise FileNotFoundError(
            f"{folder} holds no checkpoint{did_you_mean(folder)}: --torch-path takes a folder with "
            "consolidated.00.pth, consolidated.safetensors, model*.safetensors or "
            "pytorch_model*.bin"
        )
    return checkpoint


def open_meta(folder: Path) -> Checkpoint | None:
    """Open the shards of Meta's layout; None where there are none."""
    files = sorted(folder.glob("consolidated.[0-9][0-9].pth"))
    if not files:
        return None
    for i in range(int(files[-1].suffixes[-2][1:]) + 1):
        find_file(folder / f"consolidated.{i:02}.pth")
    return open_release(folder, files, open_torch)


def open_mistral(folder: Path) -> Checkpoint | None:
    """Open the file of Mistral's layout; None where there is none."""
    file = folder / "consolidated.safetensors"
    return open_release(folder, [file], open_safetensors) if file.is_file() else None


def open_release(
    folder: Path, files: list[Path], open_file: Callable[[Path], dict[str, LazyTensor]]
) -> Checkpoint:
    """Open the files of a release, which params.json describes.

    Mistral's repositories have Hugging Face's files, too: their config.json says what params.json
    leaves out. Raises FileNotFoundError, or ValueError for a model that cannot be run.
    """
    source, config = folder / "params.json", folder / "config.json"
    params = read_json(source)
    check_params(params, source)
    tensors = collect_shards(map(open_file, files))
    check_tensor_names(tensors, folder)
    beside = read_json(config) if config.is_file() else None
    if beside is not None and "max_position_embeddings" in beside:
        params = {"max_position_embeddings": beside["max_position_embeddings"], **params}
    is_tied, tensors = tie_output(bool(params.get("tied_embeddings")), tensors)
    return Checkpoint(source, params_of(params, is_tied, source), tensors, beside)


def open_hugging_face(folder: Path) -> Checkpoint | None:
    """Open the files of Hugging Face's layout, safetensors first; None where there are none."""
    source = folder / "config.json"
    if source.is_file():  # before files are missed that nobody needs to download
        check_config(read_json(source), DEFAULTS)
    for whole, open_file in (
        (folder / "model.safetensors", open_safetensors),
        (folder / "pytorch_model.bin", open_torch),
    ):
        files = hugging_face_files(whole)
        if files:
            config = read_json(source)
            params, tensors = from_hugging_face(config, collect_shards(map(open_file, files)))
            is_tied, tensors = tie_output(bool(params.get("tie_word_embeddings")), tensors)
            params["tie_word_embeddings"] = is_tied
            return Checkpoint(source, params, tensors, config)
    return None


def hugging_face_files(whole: Path) -> list[Path]:
    """Return the files that hold a model, as transformers chooses them: the `whole` one, or those
    that its index names. Where there is neither, all that are named like pieces of it.

    Raises FileNotFoundError, or ValueError when the index is malformed.
    """
    index = whole.with_name(f"{whole.name}.index.json")
    if whole.is_file():
        return [whole]
    if not index.is_file():
        files = sorted(whole.parent.glob(f"{whole.stem}*{whole.suffix}"))
        for file in files:
            numbers = re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\..*)", file.name)
            for i in range(int(numbers[3]) if numbers else 0):
                find_file(file.with_name(f"{numbers[1]}{i + 1:05}{numbers[2]}"))
        return files
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{index} does not name the file of each tensor")
    return [find_file(whole.parent / name) for name in sorted(set(named.values()))]


# -------------------------------------------------------------------------------------------------
# Tied embeddings


def tie_output(says_tied: bool, tensors: Shards) -> tuple[bool, Shards]:
    """Return whether the output projection is the embedding, and the tensors with one of both then.

    says_tied: whether the params say so, which counts where one of both is stored. Where both are,
    they are compared, as transformers does: Llama 3.2's small models are stored so.
    """
    names = "tok_embeddings.weight", "output.weight"
    stored = [tensors[name] for name in names if name in tensors]
    if not (are_equal(*stored) if len(stored) == 2 else says_tied and stored):
        return False, tensors
    others = {name: shards for name, shards in tensors.items() if name not in names}
    return True, {**others, names[0]: stored[0]}


def are_equal(embeddings: list[LazyTensor], output: list[LazyTensor]) -> bool:
    """Whether the shards of the embedding, (V, D), and of the output projection hold the same.

    Mostly the first row tells. Where a file cannot be read, they are not: reading it again names
    it.
    """
    try:
        axis = int(len(embeddings) > 1 and embeddings[0].shape[0] != output[0].shape[0])
        first = [next(shard.blocks())[:1] for shard in (embeddings if axis else embeddings[:1])]
        if embeddings[0].dtype != output[0].dtype:
            return False
        if not same_bits(np.concatenate(first, axis), next(output[0].blocks())[:1]):
            return False
        if axis == 0 and len(embeddings) == len(output):
            pairs = zip(blocks_of(embeddings), blocks_of(output), strict=True)
            return all(same_bits(one, other) for one, other in pairs)
        joined = np.concatenate([shard.read() for shard in embeddings], axis)
        return same_bits(joined, np.concatenate([shard.read() for shard in output]))
    except MemoryError:
        raise
    except Exception:
        return False


def blocks_of(shards: list[LazyTensor]) -> Iterator[np.ndarray]:
    """Yield the rows of shards that are joined along the first axis, in blocks."""
    for shard in shards:
        yield from shard.blocks()


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays have one shape and equal bits."""
    return one.shape == other.shape and one.tobytes() == other.tobytes()


# -------------------------------------------------------------------------------------------------
# Checks


def check_tensors(checkpoint: Checkpoint, config: dict, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check that the tensors are the parameters of a model.

    config: its `ModelArgs`; shapes: of its parameters, by name.
    Raises ValueError, which names the tensor, or FileNotFoundError where Meta's last shards lack.
    """
    source, tensors = checkpoint.source, checkpoint.tensors
    if source.name == "params.json":
        check_shard_count(source.parent, config, tensors)
    for name in sorted(shapes.keys() ^ tensors.keys()):
        if name in shapes:
            raise ValueError(f"the checkpoint lacks {name}, which its params imply")
        reason = "biases are not supported" if name.endswith(".bias") else "it is no parameter"
        raise ValueError(f"the checkpoint holds an unknown {name}: {reason}")
    for name, shape in shapes.items():
        split_axis(name, tensors[name], shape)


def check_shard_count(folder: Path, config: dict, tensors: Shards) -> None:
    """Raise FileNotFoundError where Meta's shards of wq are the first of more than are there."""
    shards = tensors.get("layers.0.attention.wq.weight", [])
    n_rows = config["n_heads"] * config["head_dim"]
    row_shapes = {shard.shape[1:] for shard in shards}
    if row_shapes != {(config["dim"],)} or n_rows % shards[0].shape[0]:
        return
    n_shards = n_rows // shards[0].shape[0]
    if len(shards) < n_shards:
        raise FileNotFoundError(
            f"{folder / f'consolidated.{len(shards):02}.pth'} is missing: of the model's "
            f"{n_shards} parts, the folder has {len(shards)}; download the rest"
        )
