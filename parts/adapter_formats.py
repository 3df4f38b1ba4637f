"""The adapters of PEFT and of mlx-lm: folders of adapter_config.json and a safetensors file.

They are read as they are; adapter_export writes them. Their rows of wq and wk, and so the columns
of these layers' B, are in Hugging Face's order; PEFT's matrices are transposed too. What their
libraries know and this network does not, such as DoRA, is refused by its name.
"""

import json
import math
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, deserialize

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts.adapters import PROJECTIONS, check_matrix, check_scale, parse_adapter, parse_scale
from parts.files import check_content
from parts.module_names import TO_HUGGING_FACE

CONFIG = "adapter_config.json"
MODULES = {  # of a block, the linear layers: Hugging Face's names and ours
    TO_HUGGING_FACE[f"{block}.{name}"]: f"{block}.{name}" for name, block in PROJECTIONS.items()
}
MOST = 1e9  # of a rank, an alpha or a scale that a config tells
STORED_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # other than bfloat16


class Format(NamedTuple):
    """A library's folder: its file of matrices, how that calls each, whether they are transposed.

    key: with places for the layer, the module and the letter of A or B.
    """

    library: str
    weights: str
    key: str
    letters: str
    is_transposed: bool

    @property
    def files(self) -> tuple[str, str]:
        """The names of the folder's files."""
        return self.weights, CONFIG


PEFT = Format(
    "PEFT",
    "adapter_model.safetensors",
    "base_model.model.model.layers.{}.{}.lora_{}.weight",
    "AB",
    is_transposed=True,
)
MLX_LM = Format(
    "mlx-lm", "adapters.safetensors", "model.layers.{}.{}.lora_{}", "ab", is_transposed=False
)

# What PEFT's config may ask for, beside LoRA. A value that is false or null asks for nothing.
PEFT_EXTRAS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "modules_to_save": "modules that are trained as a whole",
    "trainable_token_indices": "trained embeddings of tokens",
    "lora_bias": "trained biases",
    "rank_pattern": "several ranks",
    "alpha_pattern": "several scales",
    "layer_replication": "layers that are repeated",
    "target_parameters": "LoRA of parameters that are no linear layers",
    "alora_invocation_tokens": "LoRA from certain tokens on",
    "arrow_config": "a choice among adapters",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # to start, PEFT changes the model

# What a name stands for that is none of a LoRA matrix.
NOT_LORA = {
    r"lora_magnitude_vector|\.m$": "DoRA",
    r"lora_embedding_|(embed_tokens|lm_head).*\.lora_": "LoRA of an embedding or the output",
    r"embed_tokens|lm_head": "a trained embedding or output",
    r"bias$": "a trained bias",
    r"\.layers\.\d+\..*\.lora_": f"no LoRA matrix of {', '.join(MODULES)}",
}


# -------------------------------------------------------------------------------------------------
# Read


def read_file(path: str | Path) -> bytes | None:
    """Return a file's content, None where it is missing. Raises OSError."""
    return Path(path).read_bytes() if Path(path).is_file() else None


def read_matrices(
    path: str | Path, head_dim: int, read: Callable[[Path], bytes | None] = read_file
) -> tuple[dict[str, np.ndarray], float]:
    """Return the LoRA matrices (float32) by parameter path, and their scale, of an adapter file, or
    of a folder of PEFT's or mlx-lm's.

    head_dim: of the model. read: as `read_file`; `Ranks.read` gives all ranks the same.
    Raises OSError, or ValueError when it is damaged or holds anything else.
    """
    content = read(Path(path))
    if content is None:
        return read_foreign(path, head_dim, read)
    return parse_adapter(content, path), parse_scale(content, path)


def read_foreign(
    folder: str | Path, head_dim: int, read: Callable[[Path], bytes | None] = read_file
) -> tuple[dict[str, np.ndarray], float]:
    """Return the matrices and the scale of a folder of PEFT's or mlx-lm's, as `read_matrices`."""
    form, rank, scale = read_config(folder, read)
    path = Path(folder) / form.weights
    content = read(path)
    if content is None:
        raise ValueError(missing_weights(path))
    matrices = {}
    for name, tensor in parse_safetensors(content, path).items():
        layer, module, letter = parse_name(name, form, path)
        matrix = check_matrix(name, tensor, path)
        matrix = matrix.T if form.is_transposed else matrix
        n_ranks = matrix.shape[1] if letter == "a" else matrix.shape[0]
        if n_ranks != rank:
            raise ValueError(f"{name} in {path} has rank {n_ranks}, where {CONFIG} says {rank}")
        if letter == "b" and is_rotated(module):
            if matrix.shape[1] % head_dim:
                raise ValueError(
                    f"{name} in {path} has the shape {tensor.shape}, which is not of whole heads "
                    f"of {head_dim}: use the model that it was trained on"
                )
            matrix = join_halves(matrix, head_dim)
        matrices[f"layers.{layer}.{module}.lora_{letter}"] = np.ascontiguousarray(matrix)
    if not matrices:
        raise ValueError(f"{path} holds no LoRA matrices: train again")
    return matrices, scale


def check_folder(folder: Path) -> None:
    """Find what can be seen before the model is loaded: files that are missing, and settings that
    cannot be run. Raises ValueError.
    """
    form, *_ = read_config(folder, read_file)
    weights = folder / form.weights
    if not weights.is_file():
        raise ValueError(missing_weights(weights))
    check_content(weights)


def missing_weights(path: Path) -> str:
    """What to say where a folder lacks its matrices."""
    pickled = path.with_name("adapter_model.bin")
    if pickled.is_file():
        return (
            f"{pickled} is a pickle, which can run any code when it is read: save the adapter as "
            f"{path.name}, with PEFT's save_pretrained(..., safe_serialization=True)"
        )
    return f"{path} is missing: copy the whole folder"


def parse_name(name: str, form: Format, path: Path) -> tuple[int, str, str]:
    """Return the layer, our name of the module, and a or b, of the name of a matrix.

    Raises ValueError, which says what it is instead.
    """
    pattern = re.escape(form.key).replace(r"\{\}", "{}")
    pattern = pattern.format(r"(0|[1-9]\d{0,3})", r"(\w+\.\w+)", f"([{form.letters}])")
    match = re.fullmatch(pattern, name)
    if match is None or match[2] not in MODULES:
        what = (words for found, words in NOT_LORA.items() if re.search(found, name))
        raise ValueError(
            f"{path} holds {name}, which is {next(what, 'no LoRA matrix')}: that cannot be used "
            "here; merge it in the library that made it, and run convert.py"
        )
    return int(match[1]), MODULES[match[2]], match[3].lower()


def parse_safetensors(content: bytes, path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file's content by name, bfloat16 as float32.

    Raises ValueError where it is damaged, or has another type.
    """
    try:
        stored = deserialize(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error
    tensors = {}
    for name, tensor in sorted(stored, key=lambda item: item[0]):
        if tensor["dtype"] not in STORED_TYPES:
            raise ValueError(f"{name} in {path} is {tensor['dtype']}, which is no matrix of floats")
        array = np.frombuffer(tensor["data"], STORED_TYPES[tensor["dtype"]])
        if tensor["dtype"] == "BF16":  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = array.reshape(tensor["shape"])
    return tensors


# -------------------------------------------------------------------------------------------------
# Read what the config says


def read_config(
    folder: str | Path, read: Callable[[Path], bytes | None]
) -> tuple[Format, int, float]:
    """Return whose adapter a folder holds, its rank and its scale.

    Raises ValueError, which names the setting, where it is none, or not one of LoRA alone.
    """
    path = Path(folder) / CONFIG
    content = read(path)
    if content is None:
        raise ValueError(
            f"{folder} is no adapter: name the .npz file that lora.py --train wrote, or a folder "
            f"of PEFT's or mlx-lm's, which holds {CONFIG}"
        )
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(config, dict) and "peft_type" in config:
        form, (rank, scale) = PEFT, parse_peft(config, path)
    elif isinstance(config, dict) and ("lora_parameters" in config or "fine_tune_type" in config):
        form, (rank, scale) = MLX_LM, parse_mlx_lm(config, path)
    else:
        raise ValueError(f"{path} is neither PEFT's nor mlx-lm's")
    return form, rank, check_scale(scale, path)


def refuse(path: Path, setting: str, what: str) -> None:
    """Raise ValueError: the setting asks for what this network does not have."""
    raise ValueError(
        f"{path} has {setting}, {what}, which cannot be used here: merge the adapter in the "
        "library that made it, and run convert.py"
    )


def parse_peft(config: dict, path: Path) -> tuple[int, float]:
    """Return the rank and the scale that PEFT's config describes. Raises ValueError."""
    if config["peft_type"] != "LORA":
        refuse(path, f"peft_type {config['peft_type']!r}", "and not LORA")
    for name, what in PEFT_EXTRAS.items():
        if config.get(name):
            refuse(path, name, what)
    if config.get("bias", "none") != "none":
        refuse(path, f"bias {config['bias']!r}", "trained biases")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGES_BASE):
        raise ValueError(
            f"{path} has init_lora_weights {start!r}, which changes the model's own weights: save "
            "it as plain LoRA, with PEFT's path_initial_model_for_weight_conversion"
        )
    rank = number_of(config, "r", int, path)
    alpha = number_of(config, "lora_alpha", float, path)
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def parse_mlx_lm(config: dict, path: Path) -> tuple[int, float]:
    """Return the rank and the scale that mlx-lm's config describes. Raises ValueError."""
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        what = {"dora": "DoRA", "full": "weights that are trained as a whole"}
        refuse(path, f"fine_tune_type {kind!r}", what.get(kind, "and not lora"))
    settings = config.get("lora_parameters")
    if not isinstance(settings, dict):
        raise ValueError(f"{path} lacks lora_parameters, with the rank and the scale")
    rank = number_of(settings, "rank", int, path)
    if settings.get("alpha", rank) != rank:
        raise ValueError(
            f"{path} has alpha, by which old versions of mlx-lm multiply the scale and divide it "
            "by the rank, and later ones do not: take it out, with scale the factor itself"
        )
    return rank, number_of(settings, "scale", float, path)


def number_of(config: dict, name: str, kind: type, path: Path) -> float:
    """Return a number above 0 of a config. Raises ValueError, which names it, where it is none."""
    value = config.get(name)
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MOST:
        raise ValueError(f"{path}: {name} is {reprlib.repr(value)}, and not a number above 0")
    return value


# -------------------------------------------------------------------------------------------------
# The order of rows


def is_rotated(module: str) -> bool:
    """Whether RoPE rotates the outputs of a layer, whose order is another elsewhere."""
    return module in ("attention.wq", "attention.wk")


def split_pairs(b: np.ndarray, head_dim: int) -> np.ndarray:
    """Return B (rank, heads * head_dim) in Hugging Face's order of columns: of each head, the first
    of each pair that RoPE rotates, then the second ones. Ours are pairs of neighbours.
    """
    return b.reshape(len(b), -1, head_dim // 2, 2).swapaxes(2, 3).reshape(b.shape)


def join_halves(b: np.ndarray, head_dim: int) -> np.ndarray:
    """Return B (rank, heads * head_dim) in our order of columns, from Hugging Face's."""
    return b.reshape(len(b), -1, 2, head_dim // 2).swapaxes(2, 3).reshape(b.shape)
