"""Convert a PyTorch checkpoint of Llama or Mistral for MLX, and quantize it if asked.

python convert.py --torch-path mistral-7B-v0.1/ --mlx-path mistral-7B-v0.1-mlx/
python convert.py --torch-path mistral-7B-v0.1/ --mlx-path mistral-7B-v0.1-4bit/ -q

In: a folder with tokenizer.model and one of
- consolidated.00.pth, or the parts consolidated.00.pth, consolidated.01.pth, ..., and params.json;
- consolidated.safetensors and params.json;
- model*.safetensors or pytorch_model*.bin, and config.json, as Hugging Face has them.
Out: a folder with weights.npz (float16), params.json and tokenizer.model, for lora.py --model.
"""

from parts import python_version  # noqa: F401  before what an older Python lacks

import argparse
import difflib
import fcntl
import json
import os
import re
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from parts import device  # before MLX, for its BLAS
from parts.files import check_content
from parts.legacy_torch import is_legacy, open_legacy

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from models import Model, ModelArgs

# What a converted model consists of, in the order in which it is moved into its folder: there are
# always weights where there is a part, by which a run that was killed is recognized.
FILES = ("weights.npz", "tokenizer.model", "params.json")
CHECKPOINTS = (  # what only other models' folders hold
    "config.json",
    "consolidated.*",
    "model*.safetensors",
    "pytorch_model*.bin",
    "*.pth",
    "*.gguf",
)
ARCHITECTURES = ("llama", "mistral")  # the `model_type` of what can be converted
NOT_PARAMETERS = ("rope.freqs", ".rotary_emb.inv_freq")  # in some checkpoints; the model has them

CONTEXT = 2048  # tokens that lora.py trains on at most, unless told otherwise

HUGGING_FACE_CONFIG = {  # what ModelArgs calls the values of config.json
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
}
HUGGING_FACE_NAMES = {  # what Meta's checkpoints call the modules
    "lm_head": "output",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "model.layers": "layers",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}

# -------------------------------------------------------------------------------------------------
# Arguments


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split())
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
    group = parser.add_argument_group("quantization")
    group.add_argument(
        "-q", "--quantize", action="store_true", help="quantize all linear layers but the output"
    )
    group.add_argument(
        "--q-group-size",
        type=int,
        default=64,
        choices=(32, 64, 128),
        help="weights that share a scale (default: %(default)s)",
    )
    group.add_argument(
        "--q-bits",
        type=int,
        default=4,
        choices=(2, 3, 4, 5, 6, 8),
        help="bits a weight (default: %(default)s)",
    )
    return parser


# -------------------------------------------------------------------------------------------------
# Reading. Files are opened anew for each tensor: the pages of one that stays mapped into memory
# would add up to the whole checkpoint.


class Stored(NamedTuple):
    """A tensor in a file: its shape, and a function that reads it."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


# Of each tensor, the parts that it is stored in: one, but for Meta's larger models.
Tensors = dict[str, list[Stored]]


def open_checkpoint(folder: Path) -> tuple[Path, dict, Tensors]:
    """The file of the params, the params under Meta's names, and the tensors under Meta's names.

    Raises FileNotFoundError, or ValueError when the files are damaged or of another architecture.
    """
    params, config = folder / "params.json", folder / "config.json"
    parts = sorted(folder.glob("consolidated.[0-9][0-9].pth"))
    single = folder / "consolidated.safetensors"
    if parts:
        for i in range(int(parts[-1].suffixes[-2][1:]) + 1):
            find_file(folder / f"consolidated.{i:02}.pth")
        return params, read_params(params), gather(map(open_torch, parts))
    if single.is_file():
        return params, read_params(params), gather([open_safetensors(single)])
    for whole, open_file in (
        (folder / "model.safetensors", open_safetensors),
        (folder / "pytorch_model.bin", open_torch),
    ):
        parts = hugging_face_files(whole)
        if parts:
            return (config, *from_hugging_face(read_json(config), gather(map(open_file, parts))))
    beside = os.listdir(folder.parent) if folder.parent.is_dir() and not folder.exists() else []
    close = difflib.get_close_matches(folder.name, beside, n=1)
    meant = f" (did you mean {folder.parent / close[0]}?)" if close else ""
    raise FileNotFoundError(
        f"{folder} holds no checkpoint{meant}: --torch-path takes a folder with "
        "consolidated.00.pth, consolidated.safetensors, model*.safetensors or pytorch_model*.bin"
    )


def hugging_face_files(whole: Path) -> list[Path]:
    """The files that hold a model, as transformers chooses them: the `whole` one, or those that
    its index names. Where there is neither, all that are named like its parts.

    Raises FileNotFoundError, or ValueError when the index is malformed.
    """
    index = whole.with_name(f"{whole.name}.index.json")
    if whole.is_file():
        return [whole]
    if not index.is_file():
        parts = sorted(whole.parent.glob(f"{whole.stem}*{whole.suffix}"))
        for part in parts:
            numbers = re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\..*)", part.name)
            for i in range(int(numbers[3]) if numbers else 0):
                find_file(part.with_name(f"{numbers[1]}{i + 1:05}{numbers[2]}"))
        return parts
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{index} does not name the file of each tensor")
    return [find_file(whole.parent / name) for name in sorted(set(named.values()))]


def find_file(path: Path) -> Path:
    """The path itself. Raises FileNotFoundError, or ValueError where something else lies there."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it is part of the checkpoint, download it")
    check_content(path)
    return path


def gather(files: Iterable[dict[str, Stored]]) -> Tensors:
    """The parts of each tensor, in the order of the files that they are in."""
    tensors = {}
    for file in files:
        for name, stored in file.items():
            if not name.endswith(NOT_PARAMETERS):
                tensors.setdefault(name, []).append(stored)
    return tensors


def open_torch(path: Path) -> dict[str, Stored]:
    """The tensors of a file of torch's. No code of the file is run (`weights_only`)."""

    def load() -> dict[str, torch.Tensor]:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)

    check_content(path)
    try:
        if is_legacy(path):
            return {name: Stored(*tensor) for name, tensor in open_legacy(path).items()}
        state = load()
    except Exception as error:  # a damaged archive raises almost anything
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is damaged, or holds more than tensors ({reason})") from error
    names_tensors = isinstance(state, dict) and all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in state.items()
    )
    if not names_tensors:
        raise ValueError(f"{path} does not hold tensors by name")
    return {
        name: Stored(tuple(tensor.shape), lambda name=name: load()[name].detach())
        for name, tensor in state.items()
    }


def open_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a .safetensors file."""

    def read(name: str) -> torch.Tensor:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    check_content(path)
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    return {name: Stored(shape, lambda name=name: read(name)) for name, shape in shapes.items()}


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises FileNotFoundError or ValueError."""
    try:
        params = json.loads(find_file(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(params, dict):
        raise ValueError(f"{path} does not hold an object")
    return params


def read_params(path: Path) -> dict:
    """`params.json` of Meta's or Mistral's releases."""
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


def from_hugging_face(config: dict, tensors: Tensors) -> tuple[dict, Tensors]:
    """Hugging Face's config and tensors as Meta's. Raises ValueError for what cannot be run."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: {rope!r} does not describe RoPE")
    kind = rope.get("rope_type", rope.get("type", "default"))
    for wrong, reason in (
        ("num_local_experts" in config, "a mixture of experts"),
        (
            config.get("model_type") not in ARCHITECTURES,
            f"the architecture {name_architecture(config)}",
        ),
        (config.get("quantization_config"), "a model that is quantized already"),
        (config.get("attention_bias") or config.get("mlp_bias"), "a model with biases"),
        (kind != "default", f"scaled RoPE ({kind})"),
        (config.get("hidden_act", "silu") != "silu", f"activation {config.get('hidden_act')}"),
    ):
        if wrong:
            raise ValueError(f"config.json: {reason} is not supported")
    for name, parts in tensors.items():
        if len(parts) > 1:
            raise ValueError(f"{name} is in more than one file: leave only those of this model")
    known = {ours: config.get(theirs) for ours, theirs in HUGGING_FACE_CONFIG.items()}
    known["rope_theta"] = rope.get("rope_theta", known["rope_theta"])
    known["sliding_window"] = config.get("sliding_window")
    params = {name: value for name, value in known.items() if value is not None}

    renamed = {}
    for name, parts in tensors.items():
        for theirs, ours in HUGGING_FACE_NAMES.items():
            name = name.replace(f"{theirs}.", f"{ours}.")
        if name.endswith((".wq.weight", ".wk.weight")):
            heads = params.get("n_heads") if ".wq." in name else params.get("n_kv_heads")
            parts = [interleaved(parts[0], heads or params.get("n_heads"))]
        renamed[name] = parts
    if config.get("tie_word_embeddings") and "tok_embeddings.weight" in renamed:
        renamed.setdefault("output.weight", renamed["tok_embeddings.weight"])
    return params, renamed


def name_architecture(config: dict) -> str:
    """What a config.json says that the model is."""
    classes = config.get("architectures") or ["that it does not name"]
    return config.get("model_type") or " ".join(map(str, classes))


def interleaved(stored: Stored, n_heads: int) -> Stored:
    """Rows of wq or wk as Meta has them: of each head, a row of the first half, then its partner
    of the second, where Hugging Face has one half after the other.
    """

    def read() -> torch.Tensor:
        halves = stored.read().unflatten(0, (n_heads, 2, -1))  # heads, halves, rows, columns
        return halves.transpose(1, 2).flatten(0, 2)

    return Stored(stored.shape, read)


def complete(params: dict, tensors: Tensors) -> dict:
    """What `ModelArgs` takes, completed from the shapes of the tensors.

    Raises ValueError when a value is missing or cannot be.
    """
    if isinstance(params.get("vocab_size"), int) and params["vocab_size"] < 0:
        params = {name: value for name, value in params.items() if name != "vocab_size"}

    def rows(name: str) -> int:
        return sum(part.shape[0] for part in tensors[name])

    implied = {
        "n_kv_heads": lambda: params["n_heads"],
        "head_dim": lambda: params["dim"] // params["n_heads"],
        "hidden_dim": lambda: rows("layers.0.feed_forward.w1.weight"),
        "vocab_size": lambda: rows("output.weight"),
        "rope_theta": lambda: ModelArgs.rope_theta,
    }
    config = {}
    for name, kind in ModelArgs.__annotations__.items():
        try:
            value = params[name] if name in params else implied[name]()
        except (KeyError, TypeError, ZeroDivisionError, IndexError) as error:
            raise ValueError(f"lacks {name}, and nothing implies it ({error})") from error
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < float("inf") or (kind is int and value != int(value)):
            raise ValueError(f"{name} is {value!r}, not a positive {kind.__name__}")
        config[name] = kind(value)
    return config


def parameter_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter, in the model's order."""
    parameters = Model(ModelArgs(**config)).parameters()
    return {name: value.shape for name, value in tree_flatten(parameters)}


def check_parts(folder: Path, config: dict, tensors: Tensors) -> None:
    """Raise FileNotFoundError where Meta's parts of wq are the first of more than are there."""
    parts = tensors.get("layers.0.attention.wq.weight", [])
    n_rows = config["n_heads"] * config["head_dim"]
    shapes = {part.shape[1:] for part in parts}
    if shapes != {(config["dim"],)} or n_rows % parts[0].shape[0]:
        return
    n_parts = n_rows // parts[0].shape[0]
    if len(parts) < n_parts:
        raise FileNotFoundError(
            f"{folder / f'consolidated.{len(parts):02}.pth'} is missing: of the model's "
            f"{n_parts} parts, the folder has {len(parts)}; download the rest"
        )


def check_shapes(tensors: Tensors, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError, which names the tensor, when the tensors are not the model's parameters."""
    for name in sorted(shapes.keys() ^ tensors.keys()):
        if name in shapes:
            raise ValueError(f"the checkpoint lacks {name}, which its params imply")
        reason = "biases are not supported" if name.endswith(".bias") else "it is no parameter"
        raise ValueError(f"the checkpoint holds an unknown {name}: {reason}")
    for name, shape in shapes.items():
        split_axis(name, tensors[name], shape)


def split_axis(name: str, parts: list[Stored], shape: tuple[int, ...]) -> int | None:
    """The axis along which the parts are to be joined, or None where each is the whole.

    Meta splits rows of some matrices and columns of others, and repeats the norms.
    """
    if all(part.shape == shape for part in parts):
        return None
    if all(len(part.shape) == len(shape) for part in parts):
        for axis in range(len(shape)):
            joined = list(parts[0].shape)
            joined[axis] = sum(part.shape[axis] for part in parts)
            if tuple(joined) == shape:
                return axis
    stored = " and ".join(str(part.shape) for part in parts)
    raise ValueError(f"{name} has the shape {stored}, where the params imply {shape}")


def read_weights(
    tensors: Tensors, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Each parameter of the model, in the model's order, as float16.

    Raises ValueError when a value is not finite in float16, or cannot be read.
    """
    for name, shape in shapes.items():
        axis = split_axis(name, tensors[name], shape)
        try:
            parts = [part.read() for part in (tensors[name][:1] if axis is None else tensors[name])]
            for part in parts:
                if not part.is_floating_point():
                    raise TypeError(f"its values are {part.dtype}, which are no weights")
            half = (parts[0] if axis is None else torch.cat(parts, axis)).to(torch.float16)
            array = half.numpy()
        except MemoryError:
            raise
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{name} cannot be read ({reason})") from error
        if not all(map(torch.isfinite, torch.aminmax(half))):
            raise ValueError(f"{name} holds values that are not finite in float16")
        yield name, array


def ahead(items: Iterable) -> Iterator:
    """The items, each made in a thread while the one before it is in use."""
    items = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        item = coming.result()
        while item is not None:
            coming = pool.submit(next, items, None)
            yield item
            item = coming.result()


def find_tokenizer(folder: Path, vocab_size: int) -> Path:
    """The SentencePiece model of a checkpoint, which has no more tokens than the model.

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
    if n_tokens > vocab_size:
        raise ValueError(f"{path} has {n_tokens} tokens, the model {vocab_size}: it is of another")
    return path


# -------------------------------------------------------------------------------------------------
# Quantization


def quantize(
    weights: dict[str, np.ndarray | mx.array], config: dict, args: argparse.Namespace
) -> tuple[dict[str, mx.array], dict]:
    """The weights with every linear layer but the output quantized, and the config that says so.

    Takes `args.q_group_size` and `args.q_bits`. `config` stays as it was.
    """
    settings = {"group_size": args.q_group_size, "bits": args.q_bits}
    quantized_config = {**config, "quantization": settings}
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
    n_streams = (
        len(device.available_cores()) if device.ON_CPU else 1
    )  # a CPU's stream is one thread
    streams = [mx.new_stream(mx.default_device()) for _ in range(n_streams)]
    for name, weight in weights:
        if name not in linear:
            yield name, mx.array(weight)
            continue
        if weight.shape[1] % settings["group_size"]:
            raise ValueError(
                f"the {weight.shape[1]} columns of {name} do not divide into groups of "
                f"{settings['group_size']}: give a smaller --q-group-size"
            )
        pieces = np.array_split(weight, min(len(weight), len(streams)))
        quantized = [
            mx.quantize(mx.array(piece), **settings, stream=stream)
            for piece, stream in zip(pieces, streams, strict=False)
        ]
        mx.eval(quantized)
        parts = zip(*quantized, strict=True)
        for part, arrays in zip(("weight", "scales", "biases"), parts, strict=True):
            yield f"{name.removesuffix('weight')}{part}", mx.concatenate(arrays)


# -------------------------------------------------------------------------------------------------
# Writing


def write_npz(path: Path, arrays: Iterable[tuple[str, np.ndarray | mx.array]]) -> None:
    """Write an uncompressed .npz file, one array at a time. Equal arrays give equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays:
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                array = np.ascontiguousarray(array)
                header = np.lib.format.header_data_from_array_1_0(array)
                np.lib.format.write_array_header_1_0(member, header)
                member.write(array.data)  # without the copy that NumPy's writer makes


def stored_bytes(shapes: dict[str, tuple[int, ...]], config: dict) -> int:
    """Bytes that the converted weights take, but for the names."""
    bits = 16
    if "quantization" in config:  # a scale and a bias, float16, for each group
        bits = config["quantization"]["bits"] + 32 / config["quantization"]["group_size"]
    kept = ("tok_embeddings.weight", "output.weight")
    return sum(
        int(np.prod(shape) * (16 if name in kept or len(shape) == 1 else bits) / 8)
        for name, shape in shapes.items()
    )


def check_space(needed: int, folder: Path) -> None:
    """Raise OSError when the disk lacks the bytes."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(
            f"the converted model takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} are free on the "
            f"disk of {folder}"
        )


def convert(torch_path: Path, mlx_path: Path, args: argparse.Namespace) -> None:
    """Convert the checkpoint in `torch_path` into the folder `mlx_path`.

    Raises ValueError or FileNotFoundError for what the user can mend, OSError when the disk fails.
    """
    target = mlx_path.resolve()
    if target.exists() and torch_path.exists() and target.samefile(torch_path):
        raise ValueError(f"--mlx-path is the checkpoint's own folder, {torch_path}: name another")
    for path in (target, *target.parents):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"--mlx-path {mlx_path}: {path} is a file, not a folder")
    check_replaceable(target)
    source, params, tensors = open_checkpoint(torch_path)
    try:
        config = complete(params, tensors)
        shapes = parameter_shapes(config)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{source}: {error}") from error
    if source.name == "params.json":
        check_parts(torch_path, config, tensors)
    check_shapes(tensors, shapes)
    tokenizer = find_tokenizer(torch_path, config["vocab_size"])

    weights = with_progress(ahead(read_weights(tensors, shapes)), shapes)
    if args.quantize:
        settings = {"group_size": args.q_group_size, "bits": args.q_bits}
        config = {**config, "quantization": settings}
        weights = quantize_each(weights, config)
    check_space(stored_bytes(shapes, config), target)
    window = params.get("sliding_window")
    if isinstance(window, int) and window < CONTEXT:
        warn(f"the model was trained to see {window} positions; here it sees all before it")
    with replaced_folder(target) as folder:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
        write_npz(folder / "weights.npz", weights)
        (folder / "params.json").write_text(json.dumps(config, indent=2) + "\n")


def check_replaceable(folder: Path) -> None:
    """Raise ValueError where a model in this folder would lie among the files of another, or take
    the place of what convert.py did not make.
    """
    found = [path.name for pattern in CHECKPOINTS for path in sorted(folder.glob(pattern))]
    if found:
        raise ValueError(f"--mlx-path {folder} is another model's, with {found[0]}: name another")
    taken = [name for name in FILES if (folder / name).exists()]
    if taken and not is_converted(folder):
        raise ValueError(
            f"--mlx-path {folder} holds a {taken[0]} that convert.py did not make: name another"
        )


def is_converted(folder: Path) -> bool:
    """Whether convert.py has made the weights of this folder, and its params where there are any:
    a run that was killed may have left none.
    """
    params = folder / "params.json"
    try:
        with zipfile.ZipFile(folder / "weights.npz") as archive:
            is_model = "tok_embeddings.weight.npy" in archive.namelist()
        return is_model and (
            not params.exists() or read_json(params).keys() >= HUGGING_FACE_CONFIG.keys()
        )
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A folder to write the model into, which becomes `target` when all is written.

    Into a folder that exists, the files are moved one by one: it may be a disk of its own, and may
    hold other files. params.json is away meanwhile, so that no two models can be taken for one.
    """
    exists = target.exists()
    staged = (target / "unfinished") if exists else target.with_name(f"{target.name}.unfinished")
    if staged.exists() and not set(os.listdir(staged)) <= set(FILES):
        raise ValueError(f"{staged} is in the way, where the model is first written: move it")
    staged.mkdir(parents=True, exist_ok=True)  # with what a run that was killed has left
    lock = os.open(staged, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ValueError(f"another convert.py writes into {staged}: wait for it") from error
    try:
        yield staged
        if exists:
            (target / "params.json").unlink(missing_ok=True)
            for name in FILES:
                os.replace(staged / name, target / name)
            staged.rmdir()
        else:
            staged.rename(target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def with_progress(
    weights: Iterable[tuple[str, np.ndarray]], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Pass the weights on, and show how many bytes of float16 are done."""
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    with tqdm(desc="Converting", total=total, unit="B", unit_scale=True, disable=None) as bar:
        for name, array in weights:
            yield name, array
            bar.update(array.nbytes)


def warn(message: str) -> None:
    print(f"convert.py: warning: {message}", file=sys.stderr)


def fail(error: BaseException, status: int) -> NoReturn:
    """Say on one line what went wrong, and exit."""
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"convert.py: error: {message}", file=sys.stderr)
    sys.exit(status)


def main() -> None:
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  closed by whoever called
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows question marks
    args = build_parser().parse_args()
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))  # and clean up
    try:
        convert(Path(args.torch_path), Path(args.mlx_path), args)
        size = sum((Path(args.mlx_path) / name).stat().st_size for name in FILES)
        print(f"Wrote {args.mlx_path}, {size / 1e6:.0f} MB", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        fail(error, 2)  # the user can mend it
    except (OSError, MemoryError, RuntimeError) as error:
        fail(error, 1)  # the machine failed


if __name__ == "__main__":
    main()
