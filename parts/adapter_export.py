"""An adapter out as a folder of PEFT's or of mlx-lm's; adapter_formats has what these are."""

import json
import os
import re
from pathlib import Path

import numpy as np

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts.adapter_formats import CONFIG, MLX_LM, MODULES, PEFT, Format, is_rotated, split_pairs
from parts.export_hugging_face import MADE_BY, read_metadata, write_safetensors
from parts.fusing import Weight
from parts.staging import matching

MODEL_FILES = ("*.safetensors", "*.npz", "*.gguf", "*.bin", "*.pth", "config.json", "params.json")


def check_replaceable(folder: Path, name: str) -> None:
    """Raise ValueError where an adapter in this folder would lie among the files of a model or of
    another adapter, or take the place of what fuse.py did not make.

    name: of the format, in `FORMATS`.
    """
    form, _ = FORMATS[name]
    is_own = read_metadata(folder / form.weights).get("made_by") == MADE_BY
    own = form.files if is_own else ()
    other = set(matching(folder, (*MODEL_FILES, CONFIG))) - set(own)
    if other:
        raise ValueError(
            f"--save-path {folder} holds a {min(other)} that fuse.py did not make there: name "
            "another"
        )


def write_peft(folder: Path, matrices: dict[str, np.ndarray], scale: float, params: dict) -> None:
    """Write PEFT's files into a folder.

    matrices: (float32) by parameter path; params: the values of `ModelArgs`. Raises ValueError
    where the layers have several ranks, which other readers of the format pass over; OSError.
    """
    rank, layers_of = what_is_adapted(matrices, PEFT)
    layers = sorted(set().union(*layers_of.values()))
    if all(len(adapted) == len(layers) for adapted in layers_of.values()):
        names, numbers = [module.rpartition(".")[2] for module in layers_of], layers
    else:  # each by its own name
        names = [f"layers.{i}.{module}" for module in layers_of for i in sorted(layers_of[module])]
        numbers = None
    alpha = scale * rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": names,
        "layers_to_transform": numbers,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    write_folder(folder, matrices, config, params["head_dim"], PEFT)


def write_mlx_lm(folder: Path, matrices: dict[str, np.ndarray], scale: float, params: dict) -> None:
    """Write mlx-lm's files into a folder, as `write_peft`.

    mlx-lm adapts layers from the top. One in between that lacks in the file does nothing there.
    """
    rank, layers_of = what_is_adapted(matrices, MLX_LM)
    config = {
        "fine_tune_type": "lora",
        "num_layers": params["n_layers"] - min(set().union(*layers_of.values())),
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": list(layers_of),
        },
    }
    write_folder(folder, matrices, config, params["head_dim"], MLX_LM)


FORMATS = {"peft": (PEFT, write_peft), "mlx-lm": (MLX_LM, write_mlx_lm)}  # by fuse.py's --format


def what_is_adapted(
    matrices: dict[str, np.ndarray], form: Format
) -> tuple[int, dict[str, set[int]]]:
    """Return the rank of all matrices, and the layers of each module, by Hugging Face's names.

    Raises ValueError where there are several ranks.
    """
    ranks = sorted({matrix.shape[1] for name, matrix in matrices.items() if name.endswith("a")})
    if len(ranks) > 1:
        raise ValueError(
            f"the adapter has the ranks {' and '.join(map(str, ranks))}, and the format of "
            f"{form.library} has one: merge it, with --format hf"
        )
    layers_of = {}
    for theirs, ours in MODULES.items():
        found = (re.fullmatch(rf"layers\.(\d+)\.{re.escape(ours)}\.lora_a", n) for n in matrices)
        layers = {int(match[1]) for match in found if match}
        if layers:
            layers_of[theirs] = layers
    return ranks[0], layers_of


def write_folder(
    folder: Path, matrices: dict[str, np.ndarray], config: dict, head_dim: int, form: Format
) -> None:
    """Write the matrices and the config as one library reads them. Raises OSError."""
    theirs = {ours: name for name, ours in MODULES.items()}
    tensors = {}
    for name, matrix in matrices.items():
        _, layer, module = name.rpartition(".")[0].split(".", 2)
        letter = form.letters["ab".index(name[-1])]
        if name[-1] == "b" and is_rotated(module):
            matrix = split_pairs(matrix, head_dim)
        matrix = matrix.T if form.is_transposed else matrix
        tensors[form.key.format(layer, theirs[module], letter)] = np.ascontiguousarray(matrix)
    weights = [
        Weight(name, tensor.shape, "float32", lambda tensor=tensor: iter([tensor]))
        for name, tensor in sorted(tensors.items())
    ]
    with open(folder / form.weights, "wb") as file:
        for _ in write_safetensors(file, weights):
            pass
        file.flush()
        os.fsync(file.fileno())
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
