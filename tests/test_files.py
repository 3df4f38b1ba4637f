"""What stands in a file's place is named, whichever file it is and whichever script reads it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import MISTRAL_TOKENIZER, run_script

from parts import source_checkpoints, source_tokenizers
from parts.files import check_content
from parts.torch_files import open_torch
from parts.records import parse_record
from parts.run_files import find_siblings

LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 14483498224\n"
NAMES_LFS = "a git-lfs pointer, not the file itself: run git lfs pull there"


def error_of(script: str, *flags: str | Path) -> str:
    """The one line that a failed call prints."""
    process = run_script(script, *flags)
    assert process.returncode == 2, process.stdout + process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"{script}: error: ")
    return line


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (LFS, NAMES_LFS),
        ("<!DOCTYPE html>\n<html>", "a web page, not the file itself: download it again"),
        ("\ufeff \n<HTML lang=en>", "a web page"),
        ('<?xml version="1.0"?><Error>', "a web page"),
        ("Entry not found", "a server's error message, not the file itself"),
        ("Access to model llama is restricted.", "a server's error message"),
    ],
)
def test_what_a_download_leaves_in_a_files_place_is_named(tmp_path, content, says):
    file = tmp_path / "weights.npz"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{file} is {says}"):
        check_content(file)


@pytest.mark.parametrize("content", [b"", b'{"text": "<html>"}', b"\n\x0e\n\x05<unk>", b"PK\3\4"])
def test_a_file_is_not_taken_for_a_stand_in(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    check_content(tmp_path / "file")


@pytest.mark.parametrize("name", ["params.json", "weights.npz", "tokenizer.model"])
def test_in_a_models_folder(tiny_model, tmp_path, name):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / name).write_text(LFS)
    says = error_of("lora.py", "--model", folder, "--no-adapter", "--prompt", "hi")
    assert f"{folder / name} is {NAMES_LFS}" in says


def test_among_data_and_adapters(tiny_model, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / "valid.jsonl").write_text(LFS)
    model = "--model", tiny_model
    says = error_of(
        "lora.py", *model, "--data", folder, "--train", "--adapter-file", tmp_path / "a"
    )
    assert f"{folder / 'valid.jsonl'} is {NAMES_LFS}" in says
    for name in ("a.npz", "b.state.npz"):
        (tmp_path / name).write_text(LFS)
    says = error_of("lora.py", *model, "--adapter-file", tmp_path / "a.npz", "--prompt", "hi")
    assert f"{tmp_path / 'a.npz'} is {NAMES_LFS}" in says
    (tmp_path / "b.npz").touch()
    resume = "--train", "--resume-adapter-file", tmp_path / "b.npz"
    says = error_of("lora.py", *model, "--data", data, *resume, "--adapter-file", tmp_path / "c")
    assert f"{tmp_path / 'b.state.npz'} is {NAMES_LFS}" in says


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("consolidated.00.pth", {}),
        ("consolidated.safetensors", {"params.json": "{}"}),
        ("params.json", {"consolidated.safetensors": LFS}),
        ("config.json", {"model.safetensors": LFS}),
        ("model.safetensors", {"config.json": '{"model_type": "llama"}'}),
        ("model.safetensors.index.json", {}),
        ("pytorch_model.bin", {"config.json": '{"model_type": "llama"}'}),
    ],
)
def test_in_a_checkpoints_folder(tmp_path, name, others):
    for file, content in {**others, name: LFS}.items():
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path / name} is {NAMES_LFS}"):
        source_checkpoints.open_checkpoint(tmp_path)


def test_a_checkpoints_tokenizer(tmp_path):
    (tmp_path / "tokenizer.model").write_text(LFS)
    with pytest.raises(ValueError, match=f"tokenizer.model is {NAMES_LFS}"):
        source_tokenizers.read_source_tokenizer(tmp_path, 32000)
    (tmp_path / "consolidated.00.pth").write_text(LFS)
    (tmp_path / "params.json").write_text("{}")
    says = error_of("convert.py", "--torch-path", tmp_path, "--mlx-path", tmp_path / "mlx")
    assert f"{tmp_path / 'consolidated.00.pth'} is {NAMES_LFS}" in says


def test_a_tokenizer_that_only_counts_is_looked_at_too(tmp_path):
    tokenizer = Path(shutil.copy(MISTRAL_TOKENIZER, tmp_path / "tokenizer.model"))
    tokenizer.write_text(LFS)
    flags = "safetensors", "--data-folder", tmp_path / "data", "--tokenizer", tokenizer
    assert f"{tokenizer} is {NAMES_LFS}" in error_of("cwk_create_dataset.py", *flags)


ENTRY = {"iteration": 1, "loss": 2.0, "val_loss": None, "tokens": 3}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("photo.png", b"\x89PNG\r\n\x1a\n"),
        ("photo.state.npz", b"PK\3\4"),
        ("photo.log.jsonl", b"[" * 100_000),
        ("photo.log.jsonl", json.dumps({**ENTRY, "iteration": "one"}).encode()),
        ("photo.log.jsonl", json.dumps({**ENTRY, "loss": {}}).encode()),
    ],
)
def test_a_file_beside_the_adapters_that_no_training_made_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}, which no training made"):
        find_siblings(tmp_path / "photo.npz")


@pytest.mark.parametrize("suffix", [".png", ".log.jsonl", ".state.npz"])
def test_what_is_no_file_is_not_replaced_either(tmp_path, suffix):
    """A file that takes the place of a link takes that of what the link leads to."""
    path = tmp_path / f"run{suffix}"
    for make in (lambda: os.mkfifo(path), lambda: path.symlink_to(os.devnull)):
        make()
        with pytest.raises(ValueError, match=f"run{suffix}, which no training made"):
            find_siblings(tmp_path / "run.npz")
        path.unlink()
    path.symlink_to(tmp_path / "not-yet")
    assert find_siblings(tmp_path / "run.npz") == []


def test_a_folder_in_the_states_place_is_named(tmp_path):
    """Those in the places of the log and the plot cost these alone."""
    for suffix in (".png", ".log.jsonl"):
        (tmp_path / f"run{suffix}").mkdir()
    assert find_siblings(tmp_path / "run.npz") == []
    (tmp_path / "run.state.npz").mkdir()
    with pytest.raises(ValueError, match="run.state.npz, which no training made"):
        find_siblings(tmp_path / "run.npz")


def test_of_a_large_file_the_beginning_says_whose_it_is(tmp_path):
    with open(tmp_path / "run.log.jsonl", "wb") as file:
        file.write(json.dumps(ENTRY).encode() + b"\n")
        file.truncate(1 << 40)  # more than any memory holds
    assert find_siblings(tmp_path / "run.npz") == [tmp_path / "run.log.jsonl"]


@pytest.mark.parametrize("depth", range(900, 1010, 3))
def test_a_line_that_is_nested_too_deep_is_named(depth):
    line = b'{"text": ' + b"[" * depth + b"]" * depth + b"}"
    with pytest.raises(ValueError, match="^f, line 1 "):
        parse_record(line, "text", "f, line 1")


def test_a_tensor_of_an_old_file_lies_inside_its_storage(tmp_path):
    """As torch.load has it. What lies outside are other tensors' values, or sizes."""
    file = tmp_path / "old.pth"
    tensors = {"a": torch.ones(77)[7:], "b": torch.zeros(77)}
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    whole = file.read_bytes()
    assert len(open_torch(file)) == 2
    file.write_bytes(whole.replace(b"K\x07KF", b"K\x08KF"))
    with pytest.raises(ValueError, match="a lies outside of its storage"):
        open_torch(file)
