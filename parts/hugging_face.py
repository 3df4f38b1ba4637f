"""Hugging Face's names of modules and config, and its order of rows, turned into Meta's.

One map of names; the other way is computed from it.
"""

import re

import torch

from parts.lazy_tensors import LazyTensor, Shards

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
