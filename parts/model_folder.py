"""A model's folder: weights.npz, params.json, the tokenizer and the chat template."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from zipfile import ZipInfo

import numpy as np

from parts import device, tokenizers  # before MLX, for its BLAS
from parts.cli import did_you_mean, ignore_signals
from parts.config_values import SHAPE
from parts.files import check_content, read_json
from parts.lazy_tensors import Weight, all_blocks
from parts.pipeline import read_ahead, write_behind
from parts.staging import check_folder, staged_folder

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

# What a converted model may consist of, in the order in which it is moved into its folder: there
# are always weights where there is any of it, by which a run that was killed is recognized.
FILES = ("weights.npz", *tokenizers.FILES, *tokenizers.BESIDE, "chat_template.jinja", "params.json")
FIRST_FILES = ("weights.npz", "tokenizer.model", "params.json")  # before params.json had `eos_ids`
GROUP_SIZES, BITS = (32, 64, 128), (2, 3, 4, 5, 6, 8)  # that quantization can have
FOREIGN_FILES = (  # what only other models' folders hold
    "config.json",
    "consolidated.*",
    "model*.safetensors",
    "pytorch_model*.bin",
    "*.pth",
    "*.gguf",
    "*.index.json",
)

# -------------------------------------------------------------------------------------------------
# Read


def open_empty(
    folder: Path,
    model_class: type[nn.Module],
    args_class: type,
    quantizable: Callable[[str, nn.Module], bool],
    special_tokens: bool = False,
) -> tuple[nn.Module, tokenizers.Tokenizer]:
    """Return the model, as `read_config` does, and its tokenizer, which reads the special tokens
    that texts name where `special_tokens` says so. `load_weights` fills the model.

    Raises FileNotFoundError or ValueError when a file is missing or malformed.
    """
    tokenizer_file = tokenizers.tokenizer_file(folder)
    for path in (folder / "params.json", folder / "weights.npz", tokenizer_file):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing{did_you_mean(path)}: --model takes a folder that convert.py "
                "made, or fuse.py --format mlx"
            )
        check_content(path)
    model = read_config(folder / "params.json", model_class, args_class, quantizable)
    ids = model.args.bos_id, model.args.eos_ids
    tokenizer = tokenizers.load_tokenizer(folder, *ids, special_tokens)
    if tokenizer.vocab_size > model.args.vocab_size:
        raise ValueError(
            f"{tokenizer_file} has {tokenizer.vocab_size} tokens, the model "
            f"{model.args.vocab_size}: convert the model with its own tokenizer"
        )
    return model, tokenizer


def read_config(
    path: Path,
    model_class: type[nn.Module],
    args_class: type,
    quantizable: Callable[[str, nn.Module], bool],
) -> nn.Module:
    """Return an empty model of the shape that `params.json` gives: `model_class(args_class(...))`.
    If it is quantized, so are the layers that are `quantizable`.

    Raises ValueError when the file does not describe a model.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        quantization = config.pop("quantization", None)
        model = model_class(args_class(**config))
        if quantization is not None:
            check_quantization(quantization)
            nn.quantize(model, **quantization, class_predicate=quantizable)
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a model ({error}): run convert.py") from error
    return model


def check_quantization(settings: object) -> None:
    """Raise ValueError where params.json says what MLX cannot quantize by."""
    known = [{"group_size": size, "bits": bits} for size in GROUP_SIZES for bits in BITS]
    if settings not in known:
        raise ValueError(f"quantization is {settings!r}")


def load_weights(model: nn.Module, path: Path, dtype: mx.Dtype) -> None:
    """Fill the model with the arrays of `weights.npz`, one after the other; floating-point ones are
    cast to `dtype`.

    Raises MemoryError when the memory does not hold them, and ValueError when the file is damaged,
    or an array is missing, unknown, or of another shape than the model needs.
    """
    # NumPy reads as fast as `mx.load`, whose threads can abort a process that ends soon after.
    try:
        archive = np.load(path)
        names = set(archive.files)
    except Exception as error:  # a damaged archive raises almost anything
        raise ValueError(f"{path} is damaged ({error}): run convert.py") from error
    expected = dict(tree_flatten(model.parameters()))
    sizes = (v.nbytes if v.dtype == mx.uint32 else v.size * dtype.size for v in expected.values())
    device.check_memory(sum(sizes))
    for name in sorted(expected.keys() | names):
        if name not in expected or name not in names:
            lacks = "lacks" if name in expected else "has an unknown"
            raise ValueError(f"{path} {lacks} {name}: it does not go with params.json")
        try:
            value = mx.array(archive[name])
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(f"{name} in {path} is damaged ({error}): run convert.py") from error
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{name} in {path} has the shape {value.shape}, params.json implies "
                f"{expected[name].shape}"
            )
        if mx.issubdtype(value.dtype, mx.floating):
            value = value.astype(dtype)
        mx.eval(value)  # here, so that no more than one array is held twice
        expected[name] = value
    archive.close()
    model.update(tree_unflatten(list(expected.items())))
    device.give_back_memory()


def count_parameters(model: nn.Module) -> int:
    """Return the number of the model's parameters. A quantized layer counts as the one that it
    stands for.
    """
    quantized = [m for m in model.modules() if isinstance(m, nn.QuantizedLinear)]
    packed = sum(v.size for m in quantized for v in m.parameters().values())
    unpacked = sum(m.scales.size * m.group_size for m in quantized)
    return sum(v.size for _, v in tree_flatten(model.parameters())) - packed + unpacked


def checksums(weights: Path) -> bytes:
    """Return the names and checksums of the arrays in a `weights.npz`; nothing where it is missing.

    Raises OSError or zipfile.BadZipFile.
    """
    if not weights.is_file():
        return b""
    with zipfile.ZipFile(weights) as archive:
        return repr([(m.filename, m.CRC) for m in archive.infolist()]).encode()


# -------------------------------------------------------------------------------------------------
# Write


def write_model(
    target: Path,
    weights: Iterable[Weight],
    params: dict,
    files: dict[str, Path | bytes],
    wrote: Callable[[int], object],
) -> None:
    """Write a model into the folder `target`, whole or not at all. Equal models give equal bytes.

    files: of the tokenizer and the chat template, by their names, each a file to copy, or its
    content; wrote: is called with the bytes of weights that were written, as they are.
    Call it last: once all is written, signals are ignored.
    Raises ValueError where another run writes there, or where something is in the way.
    """
    with staged_folder(target, FILES) as folder:
        for name, content in files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            else:
                (folder / name).write_bytes(content)
        with closing(write_npz(folder / "weights.npz", weights)) as sizes:
            for size in sizes:
                wrote(size)
        (folder / "params.json").write_text(json.dumps(params, indent=2) + "\n")
        ignore_signals()  # what is left is to move the files: too late for a status that denies it


def write_npz(path: Path, weights: Iterable[Weight]) -> Iterator[int]:
    """Write an uncompressed .npz file, and yield the bytes of each block. Equal weights give equal
    bytes. A thread makes the blocks, one writes them, and this one computes the checksums.
    """
    with (
        closing(read_ahead(all_blocks(weights))) as coming,
        write_behind(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        for weight, blocks in groupby(coming, itemgetter(0)):
            with archive.open(ZipInfo(f"{weight.name}.npy"), "w", force_zip64=True) as member:
                kind = {"descr": np.dtype(weight.dtype).str, "fortran_order": False}
                np.lib.format.write_array_header_1_0(member, {**kind, "shape": weight.shape})
                for _, block in blocks:
                    member.write(block.data)  # without the copy that NumPy's writer makes
                    yield block.nbytes


def check_target(mlx_path: Path, torch_path: Path) -> None:
    """Check that a model may be written into the folder `mlx_path`, before any work is done.

    Raises ValueError where it is the checkpoint's own folder, `torch_path`, or another model's, or
    holds what convert.py did not make; NotADirectoryError where it cannot be a folder.
    """
    target = mlx_path.resolve()
    if target.exists() and torch_path.exists() and target.samefile(torch_path):
        raise ValueError(f"--mlx-path is the checkpoint's own folder, {torch_path}: name another")
    check_folder(target, "--mlx-path")
    check_replaceable(target)


def check_replaceable(folder: Path, flag: str = "--mlx-path") -> None:
    """Raise ValueError where a model in this folder would lie among the files of another, or take
    the place of what convert.py did not make. flag: that names the folder.
    """
    found = [path.name for pattern in FOREIGN_FILES for path in sorted(folder.glob(pattern))]
    if found:
        raise ValueError(f"{flag} {folder} is another model's, with {found[0]}: name another")
    made = converted_files(folder)
    taken = [name for name in FILES if name not in made and os.path.lexists(folder / name)]
    if taken:
        raise ValueError(
            f"{flag} {folder} holds a {taken[0]} that convert.py did not make: name another"
        )


def converted_files(folder: Path) -> tuple[str, ...]:
    """Return the files of a model that may be replaced: those that convert.py writes, where it has
    made the weights of this folder, and its params where there are any, else none. A run that was
    killed may have left no params.
    """
    weights, params = folder / "weights.npz", folder / "params.json"
    if not weights.is_file() or (params.exists() and not params.is_file()):
        return ()
    try:
        with zipfile.ZipFile(weights) as archive:
            if "tok_embeddings.weight.npy" not in archive.namelist():
                return ()
        values = read_json(params) if params.exists() else None
    except (OSError, ValueError, zipfile.BadZipFile):
        return ()
    if values is None:
        return FILES
    if not values.keys() >= set(SHAPE):
        return ()
    return FILES if "eos_ids" in values else FIRST_FILES


def check_space(needed: int, folder: Path) -> None:
    """Raise OSError when the folder's disk lacks the bytes that a model needs."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(
            f"the converted model takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} are free on the "
            f"disk of {folder}"
        )
