"""Checkpoints of Llama and Mistral in Meta's, Mistral's and Hugging Face's layouts, read under
Meta's names, one tensor at a time.

layout          weights                                             shape of the model
Meta's          consolidated.00.pth, consolidated.01.pth, ...       params.json
Mistral's       consolidated.safetensors                            params.json
Hugging Face's  model*.safetensors or pytorch_model*.bin            config.json

Meta splits its larger models into shards: each file has some rows or columns of every tensor.
Hugging Face's files have some tensors each, whole, under other names, and the rows of wq and wk in
another order (`permute`).
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from sentencepiece import SentencePieceProcessor

from parts.cli import did_you_mean
from parts.files import check_content, find_file, read_json
from parts.lazy_tensors import (
    LazyTensor,
    Shards,
    collect_shards,
    open_safetensors,
    open_torch,
    split_axis,
)

ARCHITECTURES = ("llama", "mistral")  # the `model_type` of what can be converted

# Meta's names of the modules and Hugging Face's, and the other way round.
TO_HUGGING_FACE = {
    "tok_embeddings": "model.embed_tokens",
    "layers": "model.layers",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "norm": "model.norm",
    "output": "lm_head",
}
TO_META = {theirs: ours for ours, theirs in TO_HUGGING_FACE.items()}
CONFIG_TO_HUGGING_FACE = {  # what `ModelArgs` calls the values of config.json
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "sliding_window": "sliding_window",
}


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
# Hugging Face's names, config and order of rows


def from_hugging_face(config: dict, tensors: Shards) -> tuple[dict, Shards]:
    """Return Hugging Face's config and tensors as Meta's. Raises ValueError for what cannot be run.

    config: the values of config.json; tensors: under Hugging Face's names.
    """
    params = params_of(config)
    renamed = {}
    for name, shards in tensors.items():
        if len(shards) > 1:
            raise ValueError(f"{name} is in more than one file: leave only those of this model")
        name = rename(name, TO_META)
        if name.endswith((".wq.weight", ".wk.weight")):
            n_heads = params.get("n_heads") if ".wq." in name else params.get("n_kv_heads")
            shards = [permute(shards[0], n_heads or params.get("n_heads"))]
        renamed[name] = shards
    if config.get("tie_word_embeddings") and "tok_embeddings.weight" in renamed:
        renamed.setdefault("output.weight", renamed["tok_embeddings.weight"])
    return params, renamed


def params_of(config: dict) -> dict:
    """Return the values of config.json under Meta's names. Raises ValueError for a model that
    cannot be run.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: {rope!r} does not describe RoPE")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    classes = config.get("architectures") or ["that it does not name"]
    architecture = config.get("model_type") or " ".join(map(str, classes))
    for wrong, reason in (
        ("num_local_experts" in config, "a mixture of experts"),
        (config.get("model_type") not in ARCHITECTURES, f"the architecture {architecture}"),
        (config.get("quantization_config"), "a model that is quantized already"),
        (config.get("attention_bias") or config.get("mlp_bias"), "a model with biases"),
        (rope_type != "default", f"scaled RoPE ({rope_type})"),
        (config.get("hidden_act", "silu") != "silu", f"activation {config.get('hidden_act')}"),
    ):
        if wrong:
            raise ValueError(f"config.json: {reason} is not supported")
    params = {ours: config.get(theirs) for ours, theirs in CONFIG_TO_HUGGING_FACE.items()}
    params["rope_theta"] = rope.get("rope_theta", params["rope_theta"])
    return {name: value for name, value in params.items() if value is not None}


def rename(name: str, names: dict[str, str]) -> str:
    """Return a tensor's name with the modules called as `names` has them: with `TO_META`,
    layers.3.attention.wq.weight for model.layers.3.self_attn.q_proj.weight.
    """
    modules = "|".join(map(re.escape, names))
    return re.sub(rf"(?<![^.])({modules})(?=\.)", lambda module: names[module[0]], name)


def permute(stored: LazyTensor, n_heads: int) -> LazyTensor:
    """Return a wq or wk of Hugging Face's, (n_heads * head_dim, dim), its rows in Meta's order.

    Hugging Face has one half of each head after the other; Meta has each row of the first half
    before its partner of the second, for RoPE of the "traditional" kind.
    """

    def read() -> torch.Tensor:
        halves = stored.read().unflatten(0, (n_heads, 2, -1))  # heads, halves, rows, columns
        return halves.transpose(1, 2).flatten(0, 2)

    return LazyTensor(stored.shape, read)


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
