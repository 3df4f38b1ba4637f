"""A model out as Hugging Face's folder, which transformers, mlx-lm, vLLM and llama.cpp's converter
load: safetensors under its names and in its order of rows, config.json, the tokenizer.
"""

import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from parts import chat
from parts.byte_level_bpe import LLAMA3_PATTERN
from parts.fusing import Weight, half_split, rotated, total_bytes
from parts.hugging_face import CONFIG_TO_HUGGING_FACE, rename
from parts.lazy_tensors import all_blocks
from parts.module_names import TO_HUGGING_FACE
from parts.pipeline import WriteBehind, read_ahead, write_behind
from parts.staging import matching
from parts.source_tokenizers import to_json
from parts.tokenizer_export import begin_and_ends, tokenizer_files

SHARD_BYTES = 5_000_000_000  # of a file at most, if its tensors are not larger
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
STORED_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32"}
MADE_BY = "fuse.py"  # in the metadata of each file of weights, by which a folder of ours is known
TRANSFORMERS = "5.0.0"  # the version from which on it takes a Mistral's tokenizer as it is
CONTEXT = 2048  # positions, where params.json does not say how many the model was trained for

# What a folder holds, in the order in which it is moved into its place; the last is away meanwhile.
FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
OTHER_FORMATS = ("weights.npz", "params.json", "consolidated*", "*.bin", "*.pth", "*.gguf")
OTHER_FORMATS += ("adapter_config.json",)  # transformers would put that adapter on top


# -------------------------------------------------------------------------------------------------
# Check, before any work is done


def check_replaceable(folder: Path) -> None:
    """Raise ValueError where a model in this folder would lie among the files of another, or take
    the place of what fuse.py did not make.
    """
    taken, other = matching(folder, FILES), matching(folder, OTHER_FORMATS)
    if other or (taken and not is_exported(folder)):
        raise ValueError(
            f"--save-path {folder} holds a {(other or taken)[0]} that fuse.py did not make there: "
            "name another"
        )


def is_exported(folder: Path) -> bool:
    """Whether fuse.py has made the weights of this folder."""
    files = list(folder.glob("model*.safetensors"))
    return bool(files) and all(read_metadata(file).get("made_by") == MADE_BY for file in files)


def read_metadata(path: Path) -> dict:
    """Return the metadata of a safetensors file; nothing where it is none."""
    try:
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            return json.loads(file.read(min(size, 10**8))).get("__metadata__", {})
    except (OSError, ValueError, AttributeError, struct.error):
        return {}


# -------------------------------------------------------------------------------------------------
# Weights


def to_hugging_face(weights: Iterable[Weight], head_dim: int) -> list[Weight]:
    """Return the weights under Hugging Face's names, the rows of wq and wk in its order."""
    return [
        (half_split(weight, head_dim) if rotated(weight.name) else weight)._replace(
            name=rename(weight.name, TO_HUGGING_FACE)
        )
        for weight in weights
    ]


def write_folder(folder: Path, weights: list[Weight], others: dict[str, bytes]) -> Iterator[int]:
    """Write a model's files. Yield the bytes of weights that were written, as they are.

    weights: of `to_hugging_face`; others: the contents of the other files by name.
    """
    for name, content in others.items():
        (folder / name).write_bytes(content)
    shards = split_shards(weights)
    for name, shard in shards.items():
        with write_behind(folder / name) as file:
            yield from write_safetensors(file, shard)
            file.sync()
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total_bytes(weights)},
            "weight_map": {w.name: name for name, shard in shards.items() for w in shard},
        }
        (folder / "model.safetensors.index.json").write_bytes(to_json(index))


def split_shards(weights: list[Weight]) -> dict[str, list[Weight]]:
    """Return the weights of each file, none larger than SHARD_BYTES if no tensor is."""
    shards = [[]]
    for weight in weights:
        if shards[-1] and total_bytes(shards[-1]) + weight.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(weight)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    n = len(shards)
    return {f"model-{i:05}-of-{n:05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_safetensors(file: BinaryIO | WriteBehind, weights: list[Weight]) -> Iterator[int]:
    """Write weights into an open file, block by block, and yield the bytes of each.

    The format: the size of a JSON object (uint64), the object, which has each tensor's type, shape
    and place, and the tensors' bytes. https://github.com/huggingface/safetensors#format
    """
    header, end = {"__metadata__": {"format": "pt", "made_by": MADE_BY}}, 0
    for weight in weights:
        start, end = end, end + weight.nbytes
        stored = {"dtype": STORED_TYPES[weight.dtype], "shape": weight.shape}
        header[weight.name] = {**stored, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the tensors start at a multiple of 8 bytes
    file.write(struct.pack("<Q", len(head)) + head)
    with closing(read_ahead(all_blocks(weights))) as blocks:
        for _, block in blocks:
            file.write(block.data)
            yield block.nbytes


# -------------------------------------------------------------------------------------------------
# What describes the model


def other_files(
    model_folder: Path, params: dict, dtype: str, template: bytes | None
) -> dict[str, bytes]:
    """Return the contents of all files but the weights, by name.

    model_folder: of convert.py; params: the values of `ModelArgs`, and `quantization` where it is
    kept; dtype: of the weights; template: of chats.
    """
    context = params["max_position_embeddings"] or CONTEXT
    bos_id, eos_ids = begin_and_ends(model_folder, params)
    tokenizer = tokenizer_files(model_folder, bos_id, eos_ids, context)
    ids = {
        "bos_token_id": bos_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids,
    }
    chats = {} if template is None else {chat.FILE: template}
    config = to_config(params, dtype, context, ids)
    if not has_wrong_pattern(tokenizer):
        config["transformers_version"] = TRANSFORMERS
    return {
        **tokenizer,
        **chats,
        "generation_config.json": to_json(ids),
        "config.json": to_json(config),
    }


def has_wrong_pattern(files: dict[str, bytes]) -> bool:
    """Whether a tokenizer's files split words by Llama 3's pattern, which some of Mistral's do by
    mistake: transformers warns of these, if config.json does not say that they are right.
    """
    return json.dumps(LLAMA3_PATTERN).encode() in files.get("tokenizer.json", b"")


def to_config(params: dict, dtype: str, context: int, ids: dict) -> dict:
    """Return the values of config.json, RoPE's at the top level, where all readers find them."""
    kind, window = params["model_type"], params["sliding_window"]
    if kind == "llama" and window:
        kind = "mistral"
    config = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{theirs: params[ours] for ours, theirs in CONFIG_TO_HUGGING_FACE.items()},
        "max_position_embeddings": context,
        "sliding_window": window,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": params["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": dtype,
        "use_cache": True,
        **ids,
    }
    if params["rope_scaling"]:
        scaling = params["rope_scaling"]
        config["rope_scaling"] = {**scaling, "type": scaling["rope_type"]}
    if kind.startswith("qwen"):  # windows in all layers or in none; biases in q, k, v by themselves
        config["use_sliding_window"] = window is not None
        config["max_window_layers"] = 0 if window else params["n_layers"]
    if params.get("quantization"):  # as mlx-lm reads it
        config["quantization"] = config["quantization_config"] = params["quantization"]
    return config
