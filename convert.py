"""Convert a PyTorch checkpoint of Llama or Mistral for MLX, and quantize it if asked.

python convert.py --torch-path mistral-7B-v0.1/ --mlx-path mistral-7B-v0.1-mlx/
python convert.py --torch-path mistral-7B-v0.1/ --mlx-path mistral-7B-v0.1-4bit/ -q

In: a folder in Meta's release layout, with consolidated.00.pth, params.json and tokenizer.model.
Out: a folder with weights.npz (float16), params.json and tokenizer.model, for lora.py --model.
"""

import argparse
import copy
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from tqdm import tqdm

# Before MLX, because it loads the BLAS that MLX is to use.
from models import Model, ModelArgs

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

CHECKPOINT = "consolidated.00.pth"
FILES = ("tokenizer.model", "weights.npz", "params.json")  # what a converted model consists of
NOT_PARAMETERS = {"rope.freqs"}  # stored in some checkpoints, computed by the model

# -------------------------------------------------------------------------------------------------
# Arguments


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The flags of this script, each documented beside its default."""
    description, _, examples = __doc__.partition("\n\n")
    parser = OneLineParser(
        prog="convert.py",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--torch-path",
        default="mistral-7B-v0.1/",
        help="folder of the checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--mlx-path", default="mlx_model/", help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "-q", "--quantize", action="store_true", help="quantize all linear layers but the output"
    )
    parser.add_argument(
        "--q-group-size",
        type=int,
        default=64,
        choices=(32, 64, 128),
        help="weights that share a scale (default: %(default)s)",
    )
    parser.add_argument(
        "--q-bits",
        type=int,
        default=4,
        choices=(2, 3, 4, 5, 6, 8),
        help="bits a weight (default: %(default)s)",
    )
    return parser


# -------------------------------------------------------------------------------------------------
# Reading


def open_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pth file by name, mapped into memory: read when they are looked at.

    No code of the file is run (`weights_only`). Raises FileNotFoundError, or ValueError when it
    holds anything but tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: --torch-path takes a folder with {CHECKPOINT}, params.json and "
            "tokenizer.model"
        )
    if path.with_name("consolidated.01.pth").exists():
        raise ValueError(f"{path.parent} holds a checkpoint in several parts, which is not read")
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged archive raises almost anything
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is damaged, or holds more than tensors ({reason})") from error
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"{path} does not hold tensors by name")
    return {name: tensor for name, tensor in state.items() if name not in NOT_PARAMETERS}


def read_config(path: Path, state: dict[str, torch.Tensor]) -> dict:
    """What `ModelArgs` takes, from `params.json`, completed from the shapes of the checkpoint.

    Raises FileNotFoundError, or ValueError when a value is missing or cannot be.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it comes with the checkpoint")
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(params, dict):
        raise ValueError(f"{path} does not hold an object")

    if isinstance(params.get("vocab_size"), int) and params["vocab_size"] < 0:
        del params["vocab_size"]  # Meta leaves it to the tokenizer
    implied = {
        "n_kv_heads": lambda: params["n_heads"],
        "head_dim": lambda: params["dim"] // params["n_heads"],
        "hidden_dim": lambda: state["layers.0.feed_forward.w1.weight"].shape[0],
        "vocab_size": lambda: state["output.weight"].shape[0],
        "rope_theta": lambda: ModelArgs.rope_theta,
    }
    config = {}
    for name, kind in ModelArgs.__annotations__.items():
        try:
            value = params[name] if name in params else implied[name]()
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{path} lacks {name}, and nothing implies it ({error})") from error
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < float("inf") or (kind is int and value != int(value)):
            raise ValueError(f"{path}: {name} is {value!r}, not a positive {kind.__name__}")
        config[name] = kind(value)
    return config


def read_weights(state: dict[str, torch.Tensor], config: dict) -> Iterator[tuple[str, np.ndarray]]:
    """Each parameter of the model, in the model's order, as float16.

    Raises ValueError when the tensors are not the model's parameters in name and shape, or when a
    value is not finite in float16.
    """
    shapes = {
        name: value.shape for name, value in tree_flatten(Model(ModelArgs(**config)).parameters())
    }
    for name in sorted(shapes.keys() ^ state.keys()):
        has = "lacks" if name in shapes else "holds an unknown"
        raise ValueError(f"the checkpoint {has} {name}: params.json describes another model")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"{name} has the shape {tuple(state[name].shape)}, params.json implies {shape}"
            )
    for name in shapes:
        half = state[name].to(torch.float16).numpy()
        if not np.isfinite(half).all():
            raise ValueError(f"{name} holds values that are not finite in float16")
        yield name, half


# -------------------------------------------------------------------------------------------------
# Quantization


def quantize(
    weights: dict[str, np.ndarray | mx.array], config: dict, args: argparse.Namespace
) -> tuple[dict[str, mx.array], dict]:
    """The weights with every linear layer but the output quantized, and the config that says so.

    Takes `args.q_group_size` and `args.q_bits`. `config` stays as it was.
    """
    quantized_config = copy.deepcopy(config)
    quantized_config["quantization"] = {"group_size": args.q_group_size, "bits": args.q_bits}
    return dict(quantize_each(weights.items(), quantized_config)), quantized_config


def quantize_each(
    weights: Iterable[tuple[str, np.ndarray | mx.array]], config: dict
) -> Iterator[tuple[str, mx.array]]:
    """Turn the weight of each linear layer into packed weights (uint32), scales and biases.

    The form is that of `nn.QuantizedLinear`: `group_size` neighbours of a row share a scale and a
    bias. Raises ValueError, which names the tensor, when groups do not fill its rows.
    """
    settings = config["quantization"]
    shape = {name: value for name, value in config.items() if name != "quantization"}
    linear = {
        f"{name}.weight"
        for name, module in Model(ModelArgs(**shape)).named_modules()
        if isinstance(module, nn.Linear) and name != "output"
    }
    for name, weight in weights:
        if name not in linear:
            yield name, mx.array(weight)
            continue
        if weight.shape[1] % settings["group_size"]:
            raise ValueError(
                f"the {weight.shape[1]} columns of {name} do not divide into groups of "
                f"{settings['group_size']}: give a smaller --q-group-size"
            )
        parts = mx.quantize(mx.array(weight), **settings)
        for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
            yield f"{name.removesuffix('weight')}{part}", array


# -------------------------------------------------------------------------------------------------
# Writing


def write_npz(path: Path, arrays: Iterable[tuple[str, np.ndarray | mx.array]]) -> None:
    """Write an uncompressed .npz file, one array at a time. Equal arrays give equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays:
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def convert(torch_path: Path, mlx_path: Path, args: argparse.Namespace) -> None:
    """Convert the checkpoint in `torch_path` into the folder `mlx_path`.

    All is written into a folder beside `mlx_path` and moved there when it is whole.
    """
    if mlx_path.resolve() == torch_path.resolve():
        raise ValueError(f"--mlx-path is the checkpoint's own folder, {torch_path}: name another")
    for path in (mlx_path, *mlx_path.parents):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"--mlx-path {mlx_path}: {path} is a file, not a folder")
    state = open_checkpoint(torch_path / CHECKPOINT)
    config = read_config(torch_path / "params.json", state)
    if not (torch_path / "tokenizer.model").is_file():
        raise FileNotFoundError(f"{torch_path / 'tokenizer.model'} is missing: copy it there")

    weights = tqdm(read_weights(state, config), "Converting", len(state), disable=None)
    if args.quantize:
        settings = {"group_size": args.q_group_size, "bits": args.q_bits}
        config = {**config, "quantization": settings}
        weights = quantize_each(weights, config)

    staged = mlx_path.resolve().with_name(f"{mlx_path.resolve().name}.partial")
    shutil.rmtree(staged, ignore_errors=True)  # of a run that was cut off
    staged.mkdir(parents=True)
    try:
        shutil.copyfile(torch_path / "tokenizer.model", staged / "tokenizer.model")
        write_npz(staged / "weights.npz", weights)
        (staged / "params.json").write_text(json.dumps(config, indent=2) + "\n")
        mlx_path.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            os.replace(staged / name, mlx_path / name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def fail(error: BaseException, status: int) -> NoReturn:
    """Say on one line what went wrong, and exit."""
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"convert.py: error: {message}", file=sys.stderr)
    sys.exit(status)


def main() -> None:
    args = build_parser().parse_args()
    try:
        convert(Path(args.torch_path), Path(args.mlx_path), args)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        fail(error, 2)  # the user can mend it
    except (OSError, MemoryError, RuntimeError) as error:
        fail(error, 1)  # the machine failed
    size = sum((Path(args.mlx_path) / name).stat().st_size for name in FILES)
    print(f"Wrote {args.mlx_path}, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
