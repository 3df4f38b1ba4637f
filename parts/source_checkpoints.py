"""Checkpoints of Llama and Mistral in Meta's, Mistral's and Hugging Face's layouts, read under
Meta's names, one tensor at a time.

layout          weights                                             shape of the model
Meta's          consolidated.00.pth, consolidated.01.pth, ...       params.json
Mistral's       consolidated.safetensors                            params.json
Hugging Face's  model*.safetensors or pytorch_model*.bin            config.json

Meta splits its larger models into shards: each file has some rows or columns of every tensor.
Hugging Face's files have some tensors each, whole, under other names, and the rows of wq and wk in
another order (see `parts.hugging_face`).
"""

import re
from pathlib import Path
from typing import NamedTuple

from sentencepiece import SentencePieceProcessor

from parts.cli import did_you_mean
from parts.files import check_content, find_file, read_json
from parts.hugging_face import ARCHITECTURES, from_hugging_face
from parts.lazy_tensors import (
    Shards,
    collect_shards,
    open_safetensors,
    open_torch,
    split_axis,
)


class Checkpoint(NamedTuple):
    """What a folder holds: the file that describes the model, what it says, and the tensors, both
    under Meta's names.
    """

    source: Path
    params: dict
    tensors: Shards


# -------------------------------------------------------------------------------------------------
# Layouts


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the checkpoint in a folder, in whichever layout.

    Raises FileNotFoundError, or ValueError when the files are damaged or of another architecture.
    """
    checkpoint = open_meta(folder) or open_mistral(folder) or open_hugging_face(folder)
    if checkpoint is None:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint{did_you_mean(folder)}: --torch-path takes a folder with "
            "consolidated.00.pth, consolidated.safetensors, model*.safetensors or "
            "pytorch_model*.bin"
        )
    return checkpoint


def open_meta(folder: Path) -> Checkpoint | None:
    """Open the shards of Meta's layout; None where there are none."""
    files, params = sorted(folder.glob("consolidated.[0-9][0-9].pth")), folder / "params.json"
    if not files:
        return None
    for i in range(int(files[-1].suffixes[-2][1:]) + 1):
        find_file(folder / f"consolidated.{i:02}.pth")
    return Checkpoint(params, read_params(params), collect_shards(map(open_torch, files)))


def open_mistral(folder: Path) -> Checkpoint | None:
    """Open the file of Mistral's layout; None where there is none."""
    file, params = folder / "consolidated.safetensors", folder / "params.json"
    if not file.is_file():
        return None
    return Checkpoint(params, read_params(params), collect_shards([open_safetensors(file)]))


def open_hugging_face(folder: Path) -> Checkpoint | None:
    """Open the files of Hugging Face's layout, safetensors first; None where there are none."""
    config = folder / "config.json"
    for whole, open_file in (
        (folder / "model.safetensors", open_safetensors),
        (folder / "pytorch_model.bin", open_torch),
    ):
        files = hugging_face_files(whole)
        if files:
            values = read_json(config)
            tensors = collect_shards(map(open_file, files))
            return Checkpoint(config, *from_hugging_face(values, tensors))
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


def read_params(path: Path) -> dict:
    """Read `params.json` of Meta's or Mistral's releases.

    Raises FileNotFoundError, or ValueError when it describes a model that cannot be run.
    """
    params = read_json(path)
    kind = params.get("model_type", "transformer")
    if kind not in ("transformer", *ARCHITECTURES):
        raise ValueError(f"{path}: the architecture {kind} is not supported")
    for name, reason in {
        "moe": "a mixture of experts",
        "use_scaled_rope": "scaled RoPE",
        "rope_scaling": "scaled RoPE",
        "yarn": "scaled RoPE",
    }.items():
        if params.get(name):
            raise ValueError(f"{path}: {reason} ({name}) is not supported")
    return params


def find_tokenizer(folder: Path, vocab_size: int) -> Path:
    """Return the SentencePiece model of a checkpoint, which has no more tokens than the model.

    Raises FileNotFoundError or ValueError.
    """
    found = [folder / "tokenizer.model", *sorted(folder.glob("tokenizer.model.v*"))]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder / 'tokenizer.model'} is missing: copy the model's SentencePiece tokenizer "
            "there (others, such as Tekken or tokenizer.json, are not supported)"
        )
    check_content(path)
    try:
        n_tokens = SentencePieceProcessor(model_proto=path.read_bytes()).vocab_size()
    except RuntimeError as error:
        raise ValueError(
            f"{path} is no SentencePiece model, such as Llama 3's, or is damaged"
        ) from error
    if not n_tokens:
        raise ValueError(f"{path} is empty: download it again")
    if n_tokens > vocab_size:
        raise ValueError(f"{path} has {n_tokens} tokens, the model {vocab_size}: it is of another")
    return path


# -------------------------------------------------------------------------------------------------
# Checks


def check_tensors(checkpoint: Checkpoint, config: dict, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check that the tensors are the parameters of a model.

    config: its `ModelArgs`; shapes: of its parameters, by name.
    Raises ValueError, which names the tensor, or FileNotFoundError where Meta's last shards lack.
    """
    source, _, tensors = checkpoint
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
