"""--mask-prompt: what counts in losses, gradients, evaluations, on ranks, and in resumed runs."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call_script, launch_ranks

from parts import device  # before MLX, for its BLAS
from parts.adapters import read_adapter, to_vector
from parts.batches import pad_batch
from parts.ranks import SINGLE

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

import lora
from models import add_lora

FLAGS = ("--mask-prompt", "--lora-layers", 2, "--batch-size", 4, "--val-batches", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory, docstrings) -> Path:
    """Prompts and completions, some longer than half of a row, and chats to test on."""
    folder = tmp_path_factory.mktemp("prompts")
    pairs = [
        (text[:cut], text[cut:]) for text, cut in zip(docstrings, [20, 60, 110] * 20, strict=False)
    ]
    pairs = [(a, b) for a, b in pairs if b.strip()]
    for name, chosen in ("train", pairs[:17]), ("valid", pairs[17:24]):
        lines = [json.dumps({"prompt": a, "completion": b}) for a, b in chosen]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    chats = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in pairs[24:31]
    ]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory, docstrings) -> Path:
    """Chats of two answers, of which some are longer than half of a row."""
    folder = tmp_path_factory.mktemp("chats")
    for name, chosen in ("train", docstrings[:13]), ("valid", docstrings[13:16]):
        cuts = [(text[:20], text[20:60], text[60:80], text[80:]) for text in chosen]
        roles = "user", "assistant", "user", "assistant"
        lines = [
            json.dumps(
                {"messages": [{"role": r, "content": c} for r, c in zip(roles, cut, strict=True)]}
            )
            for cut in cuts
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def model(tiny_model):
    model, _ = lora.load_model(tiny_model, mx.float32)
    mx.random.seed(1)
    add_lora(model, [1, 2])
    for layer in model.layers[1:]:
        for linear in (layer.attention.wq, layer.attention.wv):
            linear.lora_b = 0.1 * mx.random.normal(linear.lora_b.shape)
    return model


def train(model: Path, data: Path, adapter: Path, *flags):
    return call_script(
        "lora.py", "--model", model, "--data", data, "--train", "--adapter-file", adapter, *FLAGS,
        "--learning-rate", 1e-2, *flags,
    )  # fmt: skip


@pytest.mark.parametrize("answers", [0.9, 0.2], ids=["many-count", "few-count"])
def test_losses_and_gradients_of_what_counts_are_those_of_torch(model, answers):
    """With all targets, and where few count, with these alone."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 1000, n).astype(np.int32) for n in (40, 33, 37)]
    rows = [np.where(rng.random(len(row)) < answers, row, ~row) for row in rows]
    batch = pad_batch(rows, 40, masked=True)
    assert len(batch) == (4 if answers < 0.5 else 3)
    inputs = batch[0]

    (value, n_tokens), ours = nn.value_and_grad(model, lora.loss)(model, *batch)

    logits = torch.tensor(np.array(model(inputs)[0]), requires_grad=True)
    labels = torch.full((3, 40), -100)
    for label, row in zip(labels, rows, strict=True):
        label[: len(row) - 1] = torch.tensor(np.where(row[1:] < 0, -100, row[1:]))
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100
    )
    expected.backward()
    assert n_tokens.item() == (labels >= 0).sum()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)

    def logits_of(matrices):
        model.update(matrices)
        return (model(inputs)[0] * mx.array(logits.grad.numpy())).sum()

    theirs = to_vector(mx.grad(logits_of)(model.trainable_parameters()))
    np.testing.assert_allclose(np.array(to_vector(ours)), np.array(theirs), rtol=1e-3, atol=1e-7)


def test_a_batch_of_which_nothing_counts_changes_nothing(model):
    rows = [~np.arange(3, 20, dtype=np.int32)] * 2
    step = lora.make_step(model, optim.Adam(0.1), lora.loss, device.open_streams(1), SINGLE)
    before = np.array(to_vector(model.trainable_parameters()))
    for masked in (True, False):
        batch = pad_batch(rows, 16, masked=masked)
        result = step(*batch)
        assert result.loss.item() == 0
        assert result.n_tokens.item() == 0
        np.testing.assert_array_equal(np.array(to_vector(model.trainable_parameters())), before)
    rows = [np.arange(3, 20, dtype=np.int32)] * 2  # the optimizer is as it was, too
    assert step(*pad_batch(rows, 16)).loss.item() > 1
    after = np.array(to_vector(model.trainable_parameters()))
    first_step = 0.1 * 0.1 / 0.001**0.5  # of MLX's Adam; smaller after others
    assert np.abs(after - before).max() == pytest.approx(first_step, rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_evaluation_counts_completions_alone(tiny_model, data, batch_size):
    model, tokenizer = lora.load_model(tiny_model, mx.float32)
    losses = total = 0
    for line in (data / "valid.jsonl").read_text().splitlines():
        record = json.loads(line)
        ids = tokenizer.encode(record["prompt"] + record["completion"], eos=True)
        n = len(tokenizer.encode(record["prompt"]))
        logits = torch.tensor(np.array(model(mx.array([ids]))[0][0]))
        losses += torch.nn.functional.cross_entropy(
            logits[n - 1 : -1], torch.tensor(ids[n:]), reduction="sum"
        ).item()
        total += len(ids) - n
    dset = lora.Dataset(data / "valid.jsonl", mask_prompt=True)
    value = lora.evaluate(model, dset, lora.loss, tokenizer, batch_size, -1)
    assert value == pytest.approx(losses / total, rel=1e-5)


def test_what_does_not_count_is_left_out_with_a_warning(tiny_model, tmp_path):
    """An answer that is truncated away, and a chat without one."""
    pairs = [("a b c " * 30, " d"), ("a", " b"), ("c", " d")]
    lines = [json.dumps({"prompt": a, "completion": b}) for a, b in pairs]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    flags = "--steps-per-report", 1, "--max-seq-length", 20
    process = train(tiny_model, tmp_path, tmp_path / "a.npz", "--iters", 2, *flags)
    assert process.returncode == 0, process.stderr
    assert "a record is left out, of which --mask-prompt lets nothing count (" in process.stderr
    why = "train.jsonl, line 1: its answer begins after 20 tokens, see --max-seq-length)"
    assert why in process.stderr
    assert "valid.jsonl: nothing is validated" in process.stderr
    assert "; 2 texts, " in process.stdout
    assert "Val loss" not in process.stdout
    written = ["a.log.jsonl", "a.npz", "a.png", "a.state.npz"]
    assert sorted(path.name for path in tmp_path.glob("a*")) == written
    (tmp_path / "train.jsonl").write_text(lines[0])
    process = train(tiny_model, tmp_path, tmp_path / "b.npz", "--max-seq-length", 20)
    assert process.returncode == 2
    error = r"lora.py: error: nothing counts in any record, as in \S+train.jsonl, line 1: its .*\n"
    assert re.fullmatch(error, process.stderr.splitlines(True)[-1])


def test_a_chat_without_an_answer_is_left_out_and_why_is_said(tiny_model, tmp_path):
    question, answer = ({"role": role, "content": role} for role in ("user", "assistant"))
    chats = [[question, answer], [question]]
    lines = [json.dumps({"messages": messages}) for messages in chats]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    flags = "--chat-template", "chatml", "--iters", 1
    process = train(tiny_model, tmp_path, tmp_path / "a.npz", *flags)
    assert process.returncode == 0, process.stderr
    assert "train.jsonl, line 2: nothing in it is an answer)" in process.stderr


def test_texts_have_no_prompts_to_mask(tiny_model, data, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    process = train(tiny_model, tmp_path, tmp_path / "a.npz")
    assert process.returncode == 2
    assert re.search(r"--mask-prompt is for prompts or chats, and \S+ holds texts", process.stderr)


def test_patience_wants_a_validation_set(tiny_model, data, tmp_path):
    shutil.copy(data / "train.jsonl", tmp_path)
    process = train(tiny_model, tmp_path, tmp_path / "a.npz", "--patience", 2)
    assert process.returncode == 2
    assert "valid.jsonl is missing" in process.stderr


@pytest.mark.parametrize("kind", ["pipe", "folder", "broken link"])
def test_what_is_no_file_is_told_from_what_is_missing(tiny_model, data, tmp_path, kind):
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "broken link": lambda p: p.symlink_to("no")}
    shutil.copy(data / "train.jsonl", tmp_path)
    make[kind](tmp_path / "valid.jsonl")
    process = train(tiny_model, tmp_path, tmp_path / "a.npz")
    assert process.returncode == 2
    assert f"{tmp_path}/valid.jsonl is no file: --data takes" in process.stderr


@pytest.mark.parametrize("kind", ["completions", "chats"])
def test_a_resumed_run_ends_as_one_never_stopped_and_ranks_as_one_process(
    tiny_model, data, chats, tmp_path, kind
):
    """The ranks go on with the run of one process."""
    whole, parts, ranks = (tmp_path / name for name in ("whole.npz", "parts.npz", "ranks.npz"))
    folder = {"completions": data, "chats": chats}[kind]
    flags = ["--chat-template", "llama2"] if kind == "chats" else []
    process = train(tiny_model, folder, whole, "--iters", 6, *flags)
    assert process.returncode == 0, process.stderr
    assert train(tiny_model, folder, parts, "--iters", 2, *flags).returncode == 0
    for suffix in ("npz", "state.npz", "log.jsonl"):
        shutil.copy(parts.with_suffix(f".{suffix}"), ranks.with_suffix(f".{suffix}"))
    resumed = "--iters", 6, "--resume-adapter-file", parts
    assert train(tiny_model, folder, parts, *resumed, *flags).returncode == 0
    assert parts.read_bytes() == whole.read_bytes()

    if kind == "completions":
        return
    flags += ["--model", tiny_model, "--data", folder, "--train", *FLAGS, "--learning-rate", 1e-2]
    resumed = "--iters", 6, "--adapter-file", ranks, "--resume-adapter-file", ranks
    process = launch_ranks(2, *flags, *resumed)
    assert "The run resumes after iteration 2" in process.stdout, process.stderr
    ours, theirs = read_adapter(ranks), read_adapter(whole)
    for name, matrix in theirs.items():
        np.testing.assert_allclose(ours[name], matrix, rtol=0, atol=1e-4, err_msg=name)


def test_other_masks_are_another_run(tiny_model, data, tmp_path):
    adapter = tmp_path / "a.npz"
    assert train(tiny_model, data, adapter, "--iters", 1).returncode == 0
    flags = ["--model", tiny_model, "--data", data, "--train", "--adapter-file", adapter]
    process = call_script(
        "lora.py", *flags, *FLAGS[1:], "--learning-rate", 1e-2, "--iters", 2,
        "--resume-adapter-file", adapter,
    )  # fmt: skip
    assert process.returncode == 2
    assert "--mask-prompt is not that of the run in" in process.stderr


def test_chats_are_tested_by_the_template_that_is_given(tiny_model, data):
    base = "lora.py", "--model", tiny_model, "--data", data, "--test", "--no-adapter"
    missing = call_script(*base)
    assert missing.returncode == 2
    assert "test.jsonl holds chats: " in missing.stderr
    assert "has no chat_template.jinja" in missing.stderr
    found = call_script(*base, "--mask-prompt", "--chat-template", "llama2")
    assert re.search(r"Test loss \d+\.\d+, Test ppl", found.stdout), found.stderr
