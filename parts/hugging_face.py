"""Hugging Face's names of modules and config, and its order of rows, turned into Meta's.

What config.json leaves out is as in transformers' classes.
"""

import re
from collections.abc import Iterator

import numpy as np

from parts.lazy_tensors import LazyTensor, Shards
from parts.module_names import TO_META
from parts.unsupported import check_config, check_tensor_names, refusal

CONFIG_TO_HUGGING_FACE = {  # what `ModelArgs` calls the values of config.json
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
}
# By each `model_type` that can be converted: what transformers' class takes where a key lacks.
DEFAULTS = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
DEFAULTS["ministral"] = DEFAULTS["mistral"]  # Mistral's network, with a kind for each layer
# Of RoPE's scalings that can be run, the numbers in the order in which params.json has them.
SCALINGS = ("linear", "llama3", "yarn")
SCALING_NUMBERS = {
    "factor": float,
    "low_freq_factor": float,
    "high_freq_factor": float,
    "original_max_position_embeddings": int,
    "beta_fast": float,
    "beta_slow": float,
    "mscale": float,
    "mscale_all_dim": float,
    "attention_factor": float,
}

# -------------------------------------------------------------------------------------------------
# Tensors


def from_hugging_face(config: dict, tensors: Shards) -> tuple[dict, Shards]:
    """Return Hugging Face's config and tensors as Meta's. Raises ValueError for what cannot be run.

    config: the values of config.json; tensors: under Hugging Face's names.
    """
    params = params_of(config)
    check_tensor_names(tensors, "the checkpoint")
    renamed = {}
    for name, shards in tensors.items():
        if len(shards) > 1:
            raise ValueError(f"{name} is in more than one file: leave only those of this model")
        name = rename(name, TO_META)
        if re.search(r"\.(wq|wk)\.(weight|bias)$|\.[qk]_norm\.weight$", name):
            n_heads = params.get("n_heads")
            if ".wk." in name:
                n_heads = params.get("n_kv_heads") or n_heads
            shards = [permute(shards[0], 1 if "_norm." in name else n_heads)]
        renamed[name] = shards
    return params, renamed


def rename(name: str, names: dict[str, str]) -> str:
    """Return a tensor's name with the modules called as `names` has them: with `TO_META`,
    layers.3.attention.wq.weight for model.layers.3.self_attn.q_proj.weight.
    """
    modules = "|".join(map(re.escape, names))
    return re.sub(rf"(?<![^.])({modules})(?=\.)", lambda module: names[module[0]], name)


def permute(stored: LazyTensor, n_heads: int) -> LazyTensor:
    """Return a wq or wk of Hugging Face's, (n_heads * head_dim, dim), its rows in Meta's order; or
    a bias (n_heads * head_dim), or a norm of one head (head_dim).

    Hugging Face has one half of each head after the other; Meta has each row of the first half
    before its partner of the second, for RoPE of the "traditional" kind.
    """

    def blocks() -> Iterator[np.ndarray]:
        values = stored.read()
        halves = values.reshape(n_heads, 2, -1, *values.shape[1:])  # heads, halves, rows, columns
        yield np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)

    return stored._replace(blocks=blocks)


# -------------------------------------------------------------------------------------------------
# config.json


def params_of(config: dict) -> dict:
    """Return the values of config.json as `ModelArgs` has them. Raises ValueError for a model that
    cannot be run.
    """
    check_config(config, DEFAULTS)
    kind = config["model_type"]
    config = {"rms_norm_eps": 1e-6, **DEFAULTS[kind], **config}
    activation = config.get("hidden_act", "silu")
    for wrong, what in (
        (activation not in ("silu", "swish"), f"the activation {activation}"),
        (config.get("mlp_bias"), "a feed-forward network with biases (mlp_bias)"),
        (
            config.get("attention_bias") and kind in ("llama", "qwen3"),
            "a bias of o_proj (attention_bias)",
        ),
    ):
        if wrong:
            raise refusal("config.json", what)
    params = {ours: config.get(theirs) for ours, theirs in CONFIG_TO_HUGGING_FACE.items()}
    params["rope_theta"], params["rope_scaling"] = rope_of(config)
    params["sliding_window"] = window_of(config)
    params["attention_bias"], params["qk_norm"] = kind == "qwen2", kind == "qwen3"
    params["model_type"] = "mistral" if kind == "ministral" else kind
    return {name: value for name, value in params.items() if value is not None}


def rope_of(config: dict) -> tuple[float | None, dict | None]:
    """Return the base of RoPE's wavelengths and its scaling, None where positions are not scaled.

    transformers 5 has both in `rope_parameters`; before it `rope_scaling` had the scaling alone.
    """
    values = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise ValueError(f"config.json: {values!r} does not describe RoPE, alike for all layers")
    values = {"partial_rotary_factor": config.get("partial_rotary_factor"), **values}
    if values["partial_rotary_factor"] not in (None, 1):
        raise refusal("config.json", "RoPE of a part of each head (partial_rotary_factor)")
    if values.get("llama_4_scaling_beta"):
        raise refusal("config.json", "a temperature of queries that depends on positions")
    theta, kind = values.get("rope_theta", config.get("rope_theta")), scaling_kind(values)
    if kind == "default":
        return theta, None
    if kind not in SCALINGS:
        raise refusal("config.json", f"RoPE scaling of the kind {kind}")
    context = config.get("max_position_embeddings")
    if kind != "linear":
        values.setdefault("original_max_position_embeddings", context)
    return theta, rope_scaling(kind, values)


def scaling_kind(values: dict) -> object:
    """Return the kind of a scaling: its `rope_type`, which was `type` before."""
    return values.get("rope_type", values.get("type", "default"))


def rope_scaling(kind: str, values: dict) -> dict:
    """Return a scaling as `ModelArgs` has it: equal ones are spelled alike.

    Values that are no numbers stay as they are; `ModelArgs` refuses them.
    """
    scaling = {"rope_type": kind}
    for name, number in SCALING_NUMBERS.items():
        value = values.get(name)
        if value is not None:
            is_number = isinstance(value, (int, float)) and abs(value) < 1e300
            scaling[name] = number(value) if is_number else value
    if values.get("truncate") is False:
        scaling["truncate"] = False
    return scaling


def window_of(config: dict) -> int | None:
    """Return the positions that a query sees, None where it sees all before it.

    Raises ValueError where the layers differ.
    """
    kind, window = config["model_type"], config.get("sliding_window")
    if kind == "llama" or window is None:
        return None
    types = config.get("layer_types")
    if kind in ("qwen2", "qwen3"):
        if not config.get("use_sliding_window"):
            return None
        n_layers, first = config.get("num_hidden_layers"), config.get("max_window_layers", 28)
        if types is None and isinstance(n_layers, int) and isinstance(first, int):
            types = [
                "sliding_attention" if i >= first else "full_attention" for i in range(n_layers)
            ]
    if not isinstance(types, list) or not types:
        return window
    if any(layer != types[0] for layer in types):
        raise refusal("config.json", "a sliding window in some layers and not in others")
    return None if types[0] == "full_attention" and kind != "mistral" else window
