"""Merge an adapter into its model, and write it for other tools: Hugging Face, MLX, GGUF.

python fuse.py --model mlx_model --adapter-file adapters.npz --save-path fused
python fuse.py --model mlx_model --no-adapter --save-path base --dtype bfloat16
python fuse.py --model mlx_model --format mlx --save-path fused-mlx
python fuse.py --model mlx_model --format gguf --dtype q8_0 --save-path fused.gguf
python fuse.py --model mlx_model --format peft --save-path adapter

In: a folder that convert.py made, and the adapters for it: the file of lora.py --train, or a folder
of PEFT's or mlx-lm's.
Out, by --format:
hf    a folder for transformers, mlx-lm, vLLM and llama.cpp's converter;
mlx   a folder for lora.py --model;
gguf  one file for llama.cpp, Ollama and LM Studio;
peft, mlx-lm  the adapter alone, a folder for these libraries.
The chat template goes out with the model: its own, or the one of --chat-template, by which
lora.py taught it chats.
A quantized model is dequantized, unless --keep-quantized asks for its bits again: these lose part
of what was learnt, and with --data the script says how much.
"""

from parts import python_version  # noqa: F401  before what an older Python lacks

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from parts import device  # before MLX, for its BLAS
from parts import adapter_export, adapter_formats, adapters, chat, cli, export_gguf
from parts import export_hugging_face, flags, model_folder
from parts.cli import did_you_mean
from parts.files import atomic_write
from parts.fusing import Update, Weight, cast, fuse, merge, open_weights, total_bytes
from parts.staging import check_folder, staged_folder
from parts.tokenizer_export import begin_and_ends
from parts.tokenizers import Tokenizer

import mlx.core as mx
from mlx.utils import tree_flatten

import lora
from models import Model, ModelArgs, quantizable

DTYPES = {
    "hf": ("float16", "bfloat16", "float32"),
    "mlx": ("float16", "float32"),
    "gguf": ("float16", "bfloat16", "float32", "q8_0"),
}
DEFAULT_PATHS = {"gguf": "fused.gguf", "peft": "adapter", "mlx-lm": "adapter"}

# -------------------------------------------------------------------------------------------------
# Arguments


def build_parser() -> argparse.ArgumentParser:
    """Return the flags of this script, each documented next to its default."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--model", default="mlx_model", help="folder made by convert.py")
    add(
        "--adapter-file",
        default="adapters.npz",
        help="adapters to merge: a file, or a folder of PEFT's or mlx-lm's",
    )
    add("--no-adapter", action="store_true", help="write the model without adapters")
    add(
        "--save-path",
        help="folder, or file of --format gguf, to write (default: fused, fused.gguf, or adapter)",
    )
    formats = (*DTYPES, *adapter_export.FORMATS)
    add("--format", choices=formats, default="hf", help="for which tools")
    add(
        "--dtype",
        choices=DTYPES["gguf"],
        help="type of the weights: float32 keeps all that the adapter adds; q8_0, 8 bits, is for "
        "gguf alone (default: float16)",
    )
    add(
        "--keep-quantized",
        action="store_true",
        help="of a quantized model, merge into the bits that it has; hf is for mlx-lm alone then",
    )
    add("--data", help="folder whose test.jsonl tells what merging costs: the test perplexity")
    flags.add_mask_prompt(add)
    flags.add_chat_template(add)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Find what cannot work before anything is read. Raises ValueError or FileNotFoundError."""
    dtypes, adapter_alone = DTYPES.get(args.format, ()), args.format in adapter_export.FORMATS
    of_model = ("no_adapter", "keep_quantized", "data", "dtype", "chat_template")
    if adapter_alone and any(getattr(args, flag) for flag in of_model):
        raise ValueError(
            f"--format {args.format} writes the adapter alone, in float32: leave out --no-adapter, "
            "--keep-quantized, --data, --dtype and --chat-template"
        )
    if args.dtype is not None and args.dtype not in dtypes:
        raise ValueError(f"--format {args.format} takes --dtype {', '.join(dtypes)}")
    if args.keep_quantized and (args.format == "gguf" or args.dtype is not None):
        raise ValueError("--keep-quantized goes with --format hf or mlx, and without --dtype")
    if args.no_adapter and args.data is not None:
        raise ValueError("--data tells what merging an adapter costs: leave out --no-adapter")
    if args.mask_prompt and args.data is None:
        raise ValueError("--mask-prompt is for the test set of --data, which is not given")
    if not args.no_adapter and not Path(args.adapter_file).exists():
        raise FileNotFoundError(
            f"there is no adapter file {args.adapter_file}{did_you_mean(args.adapter_file)}: make "
            "one with lora.py --train, or give --no-adapter for the model alone"
        )
    if not args.no_adapter:
        is_file = Path(args.adapter_file).is_file()
        check = adapters.check_adapter if is_file else adapter_formats.check_folder
        check(Path(args.adapter_file))
    target = Path(args.save_path)
    if target.exists() and Path(args.model).exists() and target.samefile(args.model):
        raise ValueError(f"--save-path is the model's own folder, {args.model}: name another")
    if args.format == "gguf":
        export_gguf.import_gguf()
        export_gguf.check_replaceable(target)
        return
    check_folder(target.resolve(), "--save-path")
    if args.format == "hf":
        export_hugging_face.check_replaceable(target.resolve())
    elif adapter_alone:
        adapter_export.check_replaceable(target.resolve(), args.format)
    else:
        model_folder.check_replaceable(target.resolve(), "--save-path")


# -------------------------------------------------------------------------------------------------
# The model, and what is merged into it


def open_model(folder: Path) -> tuple[Model, Tokenizer, dict[str, Weight]]:
    """Return the model of convert.py's folder, none of its parameters computed, its tokenizer, and
    its weights.

    Raises FileNotFoundError or ValueError when a file is missing or malformed, or they do not fit.
    """
    model, tokenizer = model_folder.open_empty(folder, Model, ModelArgs, quantizable)
    kind = model.args.model_type
    if kind not in export_hugging_face.ARCHITECTURES:
        raise ValueError(f"{folder / 'params.json'} has model_type {kind!r}: run convert.py")
    weights = open_weights(folder / "weights.npz", model.args.head_dim)
    parameters = dict(tree_flatten(model.parameters()))
    expected = {name: (p.shape, p.dtype == mx.uint32) for name, p in parameters.items()}
    stored = {name: (w.shape, w.dtype == "uint32") for name, w in weights.items()}
    for name in sorted(expected.keys() | stored.keys()):
        if expected.get(name) != stored.get(name):
            raise ValueError(f"{folder / 'weights.npz'}: {name} does not go with params.json")
    return model, tokenizer, weights


def read_updates(model: Model, path: str) -> dict[str, Update]:
    """Return the LoRA matrices of an adapter file, by the path of the layer that they adapt.

    Raises OSError, or ValueError, which names the file and the key, when it does not fit the model.
    """
    lora.load_adapter(model, path)
    return {
        name: Update(np.array(layer.lora_a), np.array(layer.lora_b), layer.scale)
        for name, layer in model.named_modules()
        if "lora_a" in layer
    }


# -------------------------------------------------------------------------------------------------
# The run


def export(
    weights: list[Weight],
    params: dict,
    model: Model,
    template: bytes | None,
    args: argparse.Namespace,
) -> None:
    """Write the weights in the format that `args` asks for, whole or not at all.

    params: what params.json says of them; template: of chats. Raises ValueError or OSError.
    """
    source, target = Path(args.model), Path(args.save_path).resolve()
    dtype = args.dtype or "float16"
    values = {**vars(model.args), "quantization": params.get("quantization")}
    window = model.args.sliding_window
    if args.format == "gguf" and window:
        cli.warn(f"llama.cpp lets a position see all before it, not the last {window} alone")
    if args.format == "gguf":
        ids = begin_and_ends(source, values)
        context = values["max_position_embeddings"] or export_hugging_face.CONTEXT
        weights = export_gguf.to_gguf(weights, values, model.args.rope, dtype)
        head = export_gguf.make_head(
            source, values, model.args.rope, weights, dtype, *ids, context, template
        )
        model_folder.check_space(export_gguf.size_of(head, weights), target)
        with atomic_write(target) as file:
            show_progress(export_gguf.write_gguf(file, head, weights), weights)
        return
    weights = [cast(weight, dtype) for weight in weights]
    model_folder.check_space(total_bytes(weights), target)
    if args.format == "hf":
        others = export_hugging_face.other_files(source, values, dtype, template)
        weights = export_hugging_face.to_hugging_face(weights, model.args.head_dim)
        with staged_folder(target, export_hugging_face.FILES) as folder:
            blocks = export_hugging_face.write_folder(folder, weights, others)
            show_progress(blocks, weights)
    else:
        with staged_folder(target, model_folder.FILES) as folder:
            for name in set(model_folder.FILES) - {"weights.npz", "params.json", chat.FILE}:
                if (source / name).is_file():
                    shutil.copyfile(source / name, folder / name)
            if template is not None:
                (folder / chat.FILE).write_bytes(template)
            show_progress(model_folder.write_npz(folder / "weights.npz", weights), weights)
            (folder / "params.json").write_text(json.dumps(params, indent=2) + "\n")


def read_template(args: argparse.Namespace, tokenizer: Tokenizer) -> bytes | None:
    """Return the chat template that goes out: of --chat-template, or the model's own, if it has
    one. Raises FileNotFoundError or ValueError.
    """
    folder = Path(args.model)
    if args.chat_template is not None:
        return chat.load_template(args.chat_template, folder, tokenizer).source.encode()
    path = folder / chat.FILE
    if not path.is_file():
        return None
    try:
        return path.read_bytes().decode().encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def export_adapter(model: Model, args: argparse.Namespace) -> None:
    """Write the adapter alone, in the format that `args` asks for. Raises ValueError or OSError."""
    lora.load_adapter(model, args.adapter_file)
    matrices = adapters.to_numpy(model.trainable_parameters())
    form, write = adapter_export.FORMATS[args.format]
    with staged_folder(Path(args.save_path).resolve(), form.files) as folder:
        write(folder, matrices, adapters.scale_of(model), vars(model.args))


def show_progress(sizes: Iterator[int], weights: list[Weight]) -> None:
    """Write what `sizes` yields the bytes of, and show how many are done."""
    total = total_bytes(weights)
    bar = tqdm(desc="Writing", total=total, unit="B", unit_scale=True, disable=None)
    with closing(sizes), bar:
        for size in sizes:
            bar.update(size)


def run(args: argparse.Namespace) -> None:
    """Merge and write, and say what was written, and what it costs where there are data."""
    if args.save_path is None:
        args.save_path = DEFAULT_PATHS.get(args.format, "fused")
    check_arguments(args)
    device.keep_freed_memory()
    torch.set_num_threads(1)  # its idle threads would take the time of the one that reads
    model, tokenizer, weights = open_model(Path(args.model))
    if args.format in adapter_export.FORMATS:
        export_adapter(model, args)
        print(f"Wrote {args.save_path}: {adapters.describe_lora(model)}", flush=True)
        return
    params = json.loads((Path(args.model) / "params.json").read_text(encoding="utf-8"))
    quantization = params.get("quantization")
    if args.keep_quantized and quantization is None:
        raise ValueError(f"--keep-quantized: {args.model} is not quantized")
    if not args.keep_quantized:
        params.pop("quantization", None)
    template = read_template(args, tokenizer)
    test_set = open_test_set(args, tokenizer)
    updates = {} if args.no_adapter else read_updates(model, args.adapter_file)
    fused = fuse(weights, updates, quantization, args.keep_quantized)
    export(fused, params, model, template, args)
    target = Path(args.save_path)
    files = target.iterdir() if target.is_dir() else [target]
    size = sum(path.stat().st_size for path in files if path.is_file())
    print(f"Wrote {args.save_path}, {size / 1e6:.0f} MB", flush=True)
    if test_set is not None:
        before, after = compare(fused, updates, test_set, tokenizer, args)
        print(f"Test ppl {before:.3f} with the adapter, {after:.3f} merged.")


def open_test_set(args: argparse.Namespace, tokenizer: Tokenizer) -> "lora.Dataset | None":
    """Return the test set of `args.data`, encoded, so that its mistakes are found before anything
    is written; None without it.
    """
    if args.data is None:
        return None
    path = Path(args.data) / "test.jsonl"
    test_set = lora.Dataset(path, "text", args.mask_prompt, args.chat_template)
    test_set.encode(tokenizer)
    return test_set


def compare(
    fused: list[Weight],
    updates: dict[str, Update],
    test_set: "lora.Dataset",
    tokenizer: Tokenizer,
    args: argparse.Namespace,
) -> tuple[float, float]:
    """Return the test perplexity of the model with its adapter beside it, and of it merged."""
    model, _ = lora.load_model(args.model)
    lora.load_adapter(model, args.adapter_file)
    defaults = lora.build_parser().parse_args([])
    test_set.truncate(tokenizer, defaults.max_seq_length)
    batches = defaults.batch_size, defaults.test_batches
    before = lora.evaluate(model, test_set, lora.loss, tokenizer, *batches)
    merge(model, fused, updates)
    after = lora.evaluate(model, test_set, lora.loss, tokenizer, *batches)
    return math.exp(min(before, 700)), math.exp(min(after, 700))


def main() -> None:
    cli.run(build_parser(), run)


if __name__ == "__main__":
    main()
