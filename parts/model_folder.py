"""A model's folder: weights.npz, params.json and the tokenizer."""

import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from parts import device  # before MLX, for its BLAS
from parts.files import read_json

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

# What a converted model consists of, in the order in which it is moved into its folder: there are
# always weights where there is any of it, by which a run that was killed is recognized.
FILES = ("weights.npz", "tokenizer.model", "params.json")
PARAMS = {  # what each params.json of convert.py says
    "dim",
    "n_layers",
    "head_dim",
    "hidden_dim",
    "n_heads",
    "n_kv_heads",
    "norm_eps",
    "vocab_size",
    "rope_theta",
}
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
            nn.quantize(model, **quantization, class_predicate=quantizable)
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a model ({error}): run convert.py") from error
    return model


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
    target: Path, arrays: Iterable[tuple[str, np.ndarray | mx.array]], params: dict, tokenizer: Path
) -> None:
    """Write a model into the folder `target`, whole or not at all. Equal models give equal bytes.

    arrays: each parameter's name and value; tokenizer: the file to copy.
    Raises ValueError where another run writes there, or where something is in the way.
    """
    with staged_folder(target) as folder:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
        write_npz(folder / "weights.npz", arrays)
        (folder / "params.json").write_text(json.dumps(params, indent=2) + "\n")


def write_npz(path: Path, arrays: Iterable[tuple[str, np.ndarray | mx.array]]) -> None:
    """Write an uncompressed .npz file, one array at a time. Equal arrays give equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays:
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                array = np.ascontiguousarray(array)
                header = np.lib.format.header_data_from_array_1_0(array)
                np.lib.format.write_array_header_1_0(member, header)
                member.write(array.data)  # without the copy that NumPy's writer makes


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to write a model into, which becomes `target` when all is written.

    Into a folder that exists, the files are moved one by one: it may be a disk of its own, and may
    hold other files. params.json is away meanwhile, so that no two models can be taken for one.
    """
    exists = target.exists()
    staged = (target / "unfinished") if exists else target.with_name(f"{target.name}.unfinished")
    is_other = staged.is_symlink() or (staged.exists() and not staged.is_dir())
    if is_other or (staged.exists() and not set(os.listdir(staged)) <= set(FILES)):
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


def check_target(mlx_path: Path, torch_path: Path) -> None:
    """Check that a model may be written into the folder `mlx_path`, before any work is done.

    Raises ValueError where it is the checkpoint's own folder, `torch_path`, or another model's, or
    holds what convert.py did not make; NotADirectoryError where it cannot be a folder.
    """
    target = mlx_path.resolve()
    if target.exists() and torch_path.exists() and target.samefile(torch_path):
        raise ValueError(f"--mlx-path is the checkpoint's own folder, {torch_path}: name another")
    for path in (target, *target.parents):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"--mlx-path {mlx_path}: {path} is a file, not a folder")
    check_replaceable(target)


def check_replaceable(folder: Path) -> None:
    """Raise ValueError where a model in this folder would lie among the files of another, or take
    the place of what convert.py did not make.
    """
    found = [path.name for pattern in FOREIGN_FILES for path in sorted(folder.glob(pattern))]
    if found:
        raise ValueError(f"--mlx-path {folder} is another model's, with {found[0]}: name another")
    taken = [name for name in FILES if os.path.lexists(folder / name)]
    if taken and not is_converted(folder):
        raise ValueError(
            f"--mlx-path {folder} holds a {taken[0]} that convert.py did not make: name another"
        )


def is_converted(folder: Path) -> bool:
    """Whether convert.py has made the weights of this folder, and its params where there are any:
    a run that was killed may have left none.
    """
    weights, params = folder / "weights.npz", folder / "params.json"
    if not weights.is_file() or (params.exists() and not params.is_file()):
        return False
    try:
        with zipfile.ZipFile(weights) as archive:
            is_model = "tok_embeddings.weight.npy" in archive.namelist()
        return is_model and (not params.exists() or read_json(params).keys() >= PARAMS)
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def check_space(needed: int, folder: Path) -> None:
    """Raise OSError when the folder's disk lacks the bytes that a model needs."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(
            f"the converted model takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} are free on the "
            f"disk of {folder}"
        )
