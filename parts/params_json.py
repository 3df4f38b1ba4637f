"""params.json of Meta's and Mistral's releases, turned into the values of `ModelArgs`.

Neither says all that Hugging Face's config.json of the same model says: the rest is filled in here,
so that a model's layouts convert to equal bytes.
"""

from pathlib import Path

from parts.config_values import SHAPE
from parts.hugging_face import rope_scaling
from parts.unsupported import check_params, refusal

LLAMA_3_CONTEXT = 8192  # tokens; 3.1 and later scale RoPE beyond it


def params_of(params: dict, is_tied: bool, source: Path) -> dict:
    """Return the values of a params.json, as `ModelArgs` has them. Raises ValueError for a model
    that cannot be run.

    is_tied: whether the output projection is the embedding; source: the file, for errors.
    """
    check_params(params, source)
    is_mistral = "hidden_dim" in params and "multiple_of" not in params
    values = {name: params[name] for name in SHAPE if params.get(name) is not None}
    values["rope_scaling"] = scaling_of(params, is_tied, source)
    if is_mistral:
        values["sliding_window"] = window_of(params, source)
    values["tie_word_embeddings"] = is_tied
    values["model_type"] = "mistral" if is_mistral else "llama"
    values["max_position_embeddings"] = context_length(params, is_mistral)
    return {name: value for name, value in values.items() if value is not None}


def scaling_of(params: dict, is_tied: bool, source: Path) -> dict | None:
    """Return the scaling of RoPE, None where positions are not scaled.

    Of Llama 3.1 and later, Meta's file says only that there is one. Its factor is 8, and 32 in the
    small ones of Llama 3.2, which alone are tied (Hugging Face's config.json of each).
    """
    if params.get("rope_scaling"):
        raise refusal(source, f"RoPE scaling {params['rope_scaling']!r} (rope_scaling)")
    if params.get("use_scaled_rope"):
        values = {
            "factor": params.get("rope_scale_factor") or (32 if is_tied else 8),
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": LLAMA_3_CONTEXT,
        }
        return rope_scaling("llama3", values)
    yarn = params.get("yarn")
    if not yarn:
        return None
    if not isinstance(yarn, dict):
        raise ValueError(f"{source}: yarn is {yarn!r}, which does not describe RoPE")
    values = {**yarn, "beta_fast": yarn.get("beta"), "beta_slow": yarn.get("alpha")}
    if not yarn.get("apply_scale", True):
        values["attention_factor"] = 1
    return rope_scaling("yarn", values)


def window_of(params: dict, source: Path) -> int | None:
    """Return the positions that a query sees, None where it sees all before it.

    Raises ValueError where the layers differ, as in Ministral 8B.
    """
    window = params.get("sliding_window") or params.get("_sliding_window")
    if not isinstance(window, list):
        return window
    if any(other != window[0] for other in window):
        what = "another sliding window in some layers, as in Ministral 8B,"
        raise refusal(source, what, "Mistral 7B, Nemo or Small 3")
    return window[0]


def context_length(params: dict, is_mistral: bool) -> object:
    """Return the positions that a model is made for: what its file says, or what its release does.

    Llama 1 and 2 differ in `norm_eps`, CodeLlama and Llama 3 in `rope_theta`. Mistral's models with
    Tekken's 131,072 tokens have as many positions, unless they say otherwise.
    """
    for name in ("max_position_embeddings", "max_seq_len"):
        if params.get(name) is not None:
            return params[name]
    if is_mistral:
        return 131072 if params.get("vocab_size") == 131072 else 32768
    if params.get("use_scaled_rope"):
        return 131072
    if params.get("rope_theta") == 500000:
        return LLAMA_3_CONTEXT
    if params.get("rope_theta") == 1000000:
        return 16384
    return 2048 if params.get("norm_eps") == 1e-6 else 4096
