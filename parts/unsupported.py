"""Refuse what cannot be run: by the name that its users know, with what to take instead."""

import re
from collections.abc import Iterable
from pathlib import Path

INSTEAD = "a Llama, Mistral, Qwen 2, 2.5 or 3 model for text"
DENSE_MISTRAL = "Mistral 7B, Nemo or Small 3"
DENSE_QWEN = "Qwen 2.5 or a dense Qwen 3, such as Qwen3-8B"
UNQUANTIZED = "the model's own unquantized release, and convert.py -q"

# By the `model_type` of config.json, whole: what it is, and what to take instead.
FAMILIES = {
    r"mixtral": ("Mixtral, a mixture of experts,", DENSE_MISTRAL),
    r"qwen\d\w*moe|qwen3_next": ("Qwen's mixture of experts", DENSE_QWEN),
    r"qwen3_5\w*": ("Qwen 3.5, which has layers of linear attention,", DENSE_QWEN),
    r"qwen": ("Qwen 1", "Qwen 2.5 or Qwen 3"),
    r"qwen\d\w*_(vl|omni|audio|asr)\w*": ("Qwen VL, Omni or Audio", DENSE_QWEN),
    r"deepseek\w*": (
        "DeepSeek V2, V3 or R1",
        "DeepSeek's Llamas, or an R1-Distill of Llama or Qwen",
    ),
    r"gpt_oss": ("GPT-OSS, a mixture of experts,", INSTEAD),
    r"llama4\w*": ("Llama 4, a mixture of experts,", "Llama 3.1, 3.2 or 3.3"),
    r"mllama\w*": ("Llama 3.2 Vision", "Llama 3.1 8B, or Llama 3.2 1B or 3B"),
    r"(paligemma|gemma|recurrent_gemma|shieldgemma)\w*": ("Gemma", INSTEAD),
    r"phi\w*": ("Phi", INSTEAD),
    r"pixtral": ("Pixtral, which has a vision tower,", "Mistral Nemo or Small 3"),
    r"mistral3": ("Mistral Small 3.1 or later, which has a vision tower,", "Mistral Small 3"),
    r"ministral3": ("Ministral 3", DENSE_MISTRAL),
    r"(mistral4|mistral_large)\w*": ("this Mistral", DENSE_MISTRAL),
    r"smollm3": ("SmolLM3, which has layers without positions,", "SmolLM2"),
    r"mamba\w*": ("Mamba", INSTEAD),
}
QUANTIZED = {  # by `quant_method`
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4",
}
# How the tensors of a quantized checkpoint are called, whatever its config says.
QUANTIZED_TENSORS = {
    r"\.(qweight|qzeros)$": "GPTQ or AWQ",
    r"\.(weight_scale|weight_scale_inv|input_scale|qscale_\w+)$": "FP8",
    r"\.(SCB|absmax|quant_map)$|\.quant_state\.": "bitsandbytes",
    r"\.scales$": "mlx-lm's quantization",
}
PARAMS = {  # what Meta's and Mistral's params.json say of what cannot be run
    "moe": ("a mixture of experts, such as Mixtral,", DENSE_MISTRAL),
    "moe_args": ("Llama 4, a mixture of experts,", "Llama 3.1, 3.2 or 3.3"),
    "vision_encoder": ("a model with a vision tower, such as Pixtral,", "Mistral Nemo or Small 3"),
    "multimodal": ("a model that sees or hears, such as Voxtral,", DENSE_MISTRAL),
    "vision_args": ("a model with a vision tower", "Llama 3.1, 3.2 1B or 3B, or 3.3"),
    "vision_chunk_size": ("Llama 3.2 Vision", "Llama 3.1 8B, or Llama 3.2 1B or 3B"),
    "quantization": ("a checkpoint that is quantized already", UNQUANTIZED),
    "quantization_args": ("a checkpoint that is quantized already", UNQUANTIZED),
    "lora_args": ("a checkpoint with LoRA matrices in it", UNQUANTIZED),
    "llama_4_scaling": ("a temperature of queries that depends on positions", DENSE_MISTRAL),
    "q_lora_rank": ("latent attention", DENSE_MISTRAL),
}


def refusal(source: object, what: str, instead: str = INSTEAD) -> ValueError:
    """Return the error that says that `what` is not supported, and what to take `instead`."""
    return ValueError(f"{source}: {what} is not supported: take {instead}")


def check_config(config: dict, supported: Iterable[str]) -> None:
    """Raise ValueError where a config.json is of a model that cannot be run.

    supported: each `model_type` that can be.
    """
    source, kind = "config.json", config.get("model_type")
    kind = kind if isinstance(kind, str) else None
    if config.get("quantization_config") or config.get("quantization"):
        settings = config.get("quantization_config") or {}
        method = str(settings.get("quant_method")) if isinstance(settings, dict) else "None"
        by = QUANTIZED.get(method, method) if method != "None" else "mlx-lm"
        raise refusal(source, f"a checkpoint that is quantized already ({by})", UNQUANTIZED)
    if kind not in supported:
        for pattern, (what, instead) in FAMILIES.items():
            if re.fullmatch(pattern, kind or ""):
                raise refusal(source, what, instead)
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if config.get(name):
            raise refusal(source, f"a mixture of experts ({kind})")
    for name in ("vision_config", "text_config", "audio_config"):
        if config.get(name):
            raise refusal(source, f"a model that sees or hears ({kind}, {name})")
    listed = config.get("architectures")
    classes = " ".join(map(str, listed)) if isinstance(listed, list) else ""
    if kind not in supported:
        raise refusal(source, f"the architecture {kind or classes or 'that it does not name'}")
    if classes and "ForCausalLM" not in classes:  # such as a classifier's
        raise refusal(source, f"the architecture {classes}")


def check_params(params: dict, source: Path) -> None:
    """Raise ValueError where a params.json is of a model that cannot be run."""
    kind = params.get("model_type", "transformer")
    if kind not in ("transformer", "llama", "mistral"):
        raise refusal(source, f"the architecture {kind}")
    for name, (what, instead) in PARAMS.items():
        if params.get(name) and params[name] != -1:
            raise refusal(source, f"{what} ({name})", instead)


def check_tensor_names(names: Iterable[str], source: object) -> None:
    """Raise ValueError where tensors are called as those of a quantized checkpoint."""
    for name in names:
        for pattern, by in QUANTIZED_TENSORS.items():
            if re.search(pattern, name):
                what = f"a checkpoint that is quantized already ({by}: {name})"
                raise refusal(source, what, UNQUANTIZED)


def check_folder(folder: Path) -> None:
    """Raise ValueError where a folder, in which there is no checkpoint, holds what people take for
    one: an adapter, or a GGUF file.
    """
    if any(folder.glob("adapter_model.*")) or (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter, no model: convert the model that it was trained on"
        )
    found = sorted(folder.glob("*.gguf"))
    if found:
        raise ValueError(f"{found[0]} is a GGUF file, which is not supported: take {UNQUANTIZED}")
