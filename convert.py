"""Convert a checkpoint of Llama, Mistral or Qwen for MLX, and quantize it if asked.

python convert.py --torch-path mistral-7B-v0.1/ --mlx-path mistral-7B-v0.1-mlx/
python convert.py --torch-path Qwen2.5-7B-Instruct/ --mlx-path qwen-4bit/ -q

Models: Llama 1, 2, 3, 3.1, 3.2 (1B, 3B), 3.3, CodeLlama, TinyLlama, SmolLM, Yi, DeepSeek's Llamas;
Mistral 7B, Nemo, Small (to 2501), Mathstral, Codestral 22B; Qwen 2, 2.5 and 3 (dense).

In: a folder with the weights and the tokenizer, as it is downloaded:
- Meta's consolidated.00.pth, or its parts consolidated.00.pth, consolidated.01.pth, ..., and
  params.json;
- Mistral's consolidated.safetensors and params.json;
- Hugging Face's model*.safetensors or pytorch_model*.bin, and config.json;
- tokenizer.model (SentencePiece's, or Llama 3's), tekken.json or tokenizer.json.
Out: a folder with weights.npz (float16), params.json, tokenizer.model or tokenizer.json, and the
chat template if there is one, for lora.py --model. All layouts of one model give the same.
"""

from parts import python_version  # noqa: F401  before what an older Python lacks

import argparse
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import fields
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
from tqdm import tqdm

from parts import cli, device, model_folder, source_checkpoints  # before MLX, for its BLAS
from parts.config_values import SHAPE
from parts.lazy_tensors import Shards, Weight, read_parameters
from parts.pipeline import read_ahead
from parts.source_tokenizers import read_source_tokenizer

import mlx.core as mx
from mlx.utils import tree_flatten

from models import Model, ModelArgs, quantizable

# Of the values that have a default: those that later steps and fuse.py read.
ALWAYS_WRITTEN = "model_type", "max_position_embeddings", "bos_id", "eos_ids"
QUANTIZED = "weight", "scales", "biases"  # the arrays of a quantized layer
SPARE_ROWS = 0.01  # of a model's tokens, that a tokenizer of its own may lack

# -------------------------------------------------------------------------------------------------
# Arguments


def build_parser() -> argparse.ArgumentParser:
    """Return the flags of this script, each documented next to its default."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--torch-path", default="mistral-7B-v0.1/", help="folder of the checkpoint")
    parser.add_argument("--mlx-path", default="mlx_model/", help="folder to write")
    add = parser.add_argument_group("quantization").add_argument
    add("-q", "--quantize", action="store_true", help="quantize all linear layers but the output")
    add(
        "--q-group-size",
        type=int,
        default=64,
        choices=model_folder.GROUP_SIZES,
        help="weights that share a scale",
    )
    add("--q-bits", type=int, default=4, choices=model_folder.BITS, help="bits a weight")
    return parser


# -------------------------------------------------------------------------------------------------
# Quantization


def quantize(
    weights: dict[str, np.ndarray | mx.array], config: dict, args: argparse.Namespace
) -> tuple[dict[str, mx.array], dict]:
    """Quantize every linear layer but the output projection (`models.quantizable`).

    Takes `args.q_group_size` and `args.q_bits`. Returns the weights and the config that says so;
    `config` stays as it was.
    """
    config = quantized_config(config, args)
    settings, quantized = config["quantization"], {}
    streams, names = device.core_streams(), quantized_names(config)
    for name, weight in weights.items():
        if name not in names:
            quantized[name] = mx.array(weight)
            continue
        check_groups(name, weight.shape, settings)
        rows = np.array_split(weight, min(len(weight), len(streams)))
        pieces = zip(*quantize_blocks(rows, settings, streams), strict=True)
        for key, arrays in zip(QUANTIZED, pieces, strict=True):
            quantized[f"{name.removesuffix('weight')}{key}"] = mx.concatenate(arrays)
    return quantized, config


def quantized_config(config: dict, args: argparse.Namespace) -> dict:
    """Return the config of the model quantized as `args` says."""
    return {**config, "quantization": {"group_size": args.q_group_size, "bits": args.q_bits}}


def check_groups(name: str, shape: tuple[int, ...], settings: dict) -> None:
    """Raise ValueError, which names the tensor, when groups do not fill its rows."""
    if shape[1] % settings["group_size"]:
        fits = [size for size in model_folder.GROUP_SIZES if shape[1] % size == 0]
        instead = f"give --q-group-size {fits[-1]}" if fits else "convert without -q"
        raise ValueError(
            f"the {shape[1]} columns of {name} do not divide into groups of "
            f"{settings['group_size']}: {instead}"
        )


def quantize_blocks(
    blocks: Iterable[np.ndarray | mx.array], settings: dict, streams: list[mx.Stream]
) -> Iterator[list[mx.array]]:
    """Yield the packed weights (uint32), scales and biases of each block of rows, as
    `nn.QuantizedLinear` has them: `group_size` neighbours of a row share a scale and a bias.

    The streams take blocks in turns; each has one to go on with.
    """
    waiting = deque()
    for block, stream in zip(blocks, cycle(streams), strict=False):
        values = mx.array(block)
        if values.dtype == mx.uint16:  # bfloat16's bits
            values = values.view(mx.bfloat16, stream=stream).astype(mx.float32, stream=stream)
        waiting.append(mx.quantize(values, **settings, stream=stream))
        mx.async_eval(waiting[-1])
        if len(waiting) > 2 * len(streams):
            yield waiting.popleft()
    yield from waiting


def quantize_each(weights: Iterable[Weight], config: dict) -> Iterator[Weight]:
    """Yield the arrays of a quantized model: of a linear layer its packed weights, which are
    computed while they are written, and then its scales and biases.
    """
    names, streams = quantized_names(config), device.core_streams()
    settings = config["quantization"]
    for weight in weights:
        if weight.name not in names:
            yield weight
            continue
        groups = [], []  # the scales and biases of each block
        yield weight._replace(
            shape=(weight.shape[0], weight.shape[1] * settings["bits"] // 32),
            dtype="uint32",
            blocks=partial(packed_blocks, weight, groups, settings, streams),
        )
        for key, arrays in zip(QUANTIZED[1:], groups, strict=True):
            yield Weight(
                f"{weight.name.removesuffix('weight')}{key}",
                (weight.shape[0], weight.shape[1] // settings["group_size"]),
                "float16",
                partial(iter, arrays),
            )


def packed_blocks(
    weight: Weight,
    groups: tuple[list[np.ndarray], list[np.ndarray]],
    settings: dict,
    streams: list[mx.Stream],
) -> Iterator[np.ndarray]:
    """Yield the packed weights of a layer in blocks, and add the scales and biases to `groups`."""
    with closing(read_ahead(weight.blocks())) as blocks:
        for arrays in quantize_blocks(blocks, settings, streams):
            packed, *others = map(np.array, arrays)
            for group, array in zip(groups, others, strict=True):
                group.append(array.astype(np.float16))
            yield packed


# -------------------------------------------------------------------------------------------------
# The model that a checkpoint holds


def empty_model(config: dict) -> Model:
    """Return a model of that config, not quantized, whose parameters are not computed."""
    return Model(ModelArgs(**{k: v for k, v in config.items() if k != "quantization"}))


def parameter_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter, in the model's order."""
    return {name: value.shape for name, value in tree_flatten(empty_model(config).parameters())}


def quantized_names(config: dict) -> set[str]:
    """Return the names of the weights that quantization replaces."""
    modules = empty_model(config).named_modules()
    return {f"{name}.weight" for name, module in modules if quantizable(name, module)}


def complete(params: dict, tensors: Shards) -> dict:
    """Return the values of `ModelArgs`: those of `params`, and what the tensors' shapes imply. Of
    the values that have a default, only others are written, and those in `ALWAYS_WRITTEN`.

    Raises ValueError when a value is missing or cannot be.
    """
    if isinstance(params.get("vocab_size"), int) and params["vocab_size"] < 0:
        params = {name: value for name, value in params.items() if name != "vocab_size"}

    def n_rows(name: str) -> int:
        shards = tensors[name]
        by_columns = name == "tok_embeddings.weight" and shards[0].shape[1:] != (params["dim"],)
        return sum(shard.shape[0] for shard in (shards[:1] if by_columns else shards))

    stored = "output.weight" if "output.weight" in tensors else "tok_embeddings.weight"
    implied = {
        "n_kv_heads": lambda: params["n_heads"],
        "head_dim": lambda: params["dim"] // params["n_heads"],
        "hidden_dim": lambda: n_rows("layers.0.feed_forward.w1.weight"),
        "vocab_size": lambda: n_rows(stored),
        "rope_theta": lambda: ModelArgs.rope_theta,
    }
    config = {}
    for field in fields(ModelArgs):
        name, kind = field.name, field.type
        if name not in SHAPE:
            value = params.get(name, field.default)
            if name in ALWAYS_WRITTEN or value != field.default:
                config[name] = value
            continue
        try:
            value = params[name] if name in params else implied[name]()
        except (KeyError, TypeError, ZeroDivisionError, IndexError) as error:
            raise ValueError(f"lacks {name}, and nothing implies it ({error})") from error
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < float("inf") or (kind is int and value != int(value)):
            raise ValueError(f"{name} is {value!r}, not a positive {kind.__name__}")
        config[name] = kind(value)
    return config


def stored_bytes(shapes: dict[str, tuple[int, ...]], config: dict) -> int:
    """Return the size of the converted weights in bytes, but for the names."""
    bits, quantized = 16, set()
    if "quantization" in config:  # a scale and a bias, float16, for each group
        bits = config["quantization"]["bits"] + 32 / config["quantization"]["group_size"]
        quantized = quantized_names(config)
    return sum(
        int(np.prod(shape) * (bits if name in quantized else 16) / 8)
        for name, shape in shapes.items()
    )


# -------------------------------------------------------------------------------------------------
# The run


def convert(torch_path: Path, mlx_path: Path, args: argparse.Namespace) -> None:
    """Convert the checkpoint in `torch_path` into the folder `mlx_path`, one tensor at a time.

    Raises ValueError or FileNotFoundError for a mistake of the user's, OSError when the disk fails.
    """
    model_folder.check_target(mlx_path, torch_path)
    checkpoint = source_checkpoints.open_checkpoint(torch_path)
    try:
        config = complete(checkpoint.params, checkpoint.tensors)
        shapes = parameter_shapes(config)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{checkpoint.source}: {error}") from error
    source_checkpoints.check_tensors(checkpoint, config, shapes)
    tokenizer = read_source_tokenizer(torch_path, config["vocab_size"], checkpoint.config)
    config.update(bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids)
    n_spare = config["vocab_size"] - tokenizer.n_tokens
    if n_spare > SPARE_ROWS * config["vocab_size"]:
        cli.warn(
            f"the model has {config['vocab_size']} tokens and {tokenizer.source} "
            f"{tokenizer.n_tokens}: make sure that it is the model's own"
        )

    # Nothing more is read before the file of the weights is written.
    names = quantized_names(config) if args.quantize else set()
    weights = read_parameters(checkpoint.tensors, shapes, names)
    if args.quantize:
        config = quantized_config(config, args)
        for name in names:
            check_groups(name, shapes[name], config["quantization"])
        weights = quantize_each(weights, config)
    size, target = stored_bytes(shapes, config), mlx_path.resolve()
    model_folder.check_space(size, target)
    with tqdm(desc="Converting", total=size, unit="B", unit_scale=True, disable=None) as bar:
        model_folder.write_model(target, weights, config, tokenizer.files, bar.update)


def run(args: argparse.Namespace) -> None:
    """Convert, and say what was written."""
    device.keep_freed_memory()
    folder = Path(args.mlx_path)
    convert(Path(args.torch_path), folder, args)
    files = [folder / name for name in model_folder.FILES if (folder / name).is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"Wrote {args.mlx_path}, {size / 1e6:.0f} MB", flush=True)


def main() -> None:
    cli.run(build_parser(), run)


if __name__ == "__main__":
    main()
