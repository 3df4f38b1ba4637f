"""What stands in a file's place is named, whichever file it is and whichever script reads it."""

import shutil
from pathlib import Path

import pytest
from conftest import MISTRAL_TOKENIZER, run_script

from parts import checkpoints
from parts.files import check_content

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
        ("model.safetensors", {"config.json": "{}"}),
        ("model.safetensors.index.json", {}),
        ("pytorch_model.bin", {"config.json": "{}"}),
    ],
)
def test_in_a_checkpoints_folder(tmp_path, name, others):
    for file, content in {**others, name: LFS}.items():
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path / name} is {NAMES_LFS}"):
        checkpoints.open_checkpoint(tmp_path)


def test_a_checkpoints_tokenizer(tmp_path):
    (tmp_path / "tokenizer.model").write_text(LFS)
    with pytest.raises(ValueError, match=f"tokenizer.model is {NAMES_LFS}"):
        checkpoints.find_tokenizer(tmp_path, 32000)
    (tmp_path / "consolidated.00.pth").write_text(LFS)
    (tmp_path / "params.json").write_text("{}")
    says = error_of("convert.py", "--torch-path", tmp_path, "--mlx-path", tmp_path / "mlx")
    assert f"{tmp_path / 'consolidated.00.pth'} is {NAMES_LFS}" in says


def test_a_tokenizer_that_only_counts_is_looked_at_too(tmp_path):
    tokenizer = Path(shutil.copy(MISTRAL_TOKENIZER, tmp_path / "tokenizer.model"))
    tokenizer.write_text(LFS)
    flags = "safetensors", "--data-folder", tmp_path / "data", "--tokenizer", tokenizer
    assert f"{tokenizer} is {NAMES_LFS}" in error_of("cwk_create_dataset.py", *flags)
