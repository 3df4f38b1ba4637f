"""--pack: short texts share rows, and none sees another."""

import itertools
import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import LLAMA3_ROPE, QUICK, call_script, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from parts import device, dropout, ops, ops_cpu
from parts.adapters import to_vector
from parts.batches import pad_batch
from parts.packing import best_fit, make_packing, pack_batch
from parts.ranks import on_each_stream

import mlx.core as mx
import mlx.nn as nn

import lora
from models import Model, ModelArgs, add_lora

NETWORKS = {
    "grouped heads": {},
    "window": {"sliding_window": 9, "n_kv_heads": 4},
    "norms, scaled rope": {"qk_norm": True, "rope_scaling": LLAMA3_ROPE},
}
LENGTHS = [[20, 9, 4], [33], [2, 17, 12]]  # tokens of the texts of each row
ROW_LENGTH = 40


# -------------------------------------------------------------------------------------------------
# Which texts share a row


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(0, 10))
def test_best_fit_places_each_item_in_the_fullest_row_that_has_room(sizes, slack):
    sizes = np.sort(sizes)[::-1]
    capacity, rooms = int(sizes[0]) + slack, []
    for size in sizes.tolist():  # by the rule itself
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append(min(fitting, default=capacity) - size)
    filled = np.bincount(best_fit(sizes, capacity), sizes)
    assert sorted(capacity - filled) == sorted(rooms)


@pytest.mark.parametrize(
    "median, spread, max_length, longest_row",
    [(120, 0.7, 2048, 2048), (30, 0.2, 2048, 512), (900, 0.5, 2048, 2048), (60, 0.9, 300, 304)],
)
def test_rows_are_full_and_as_short_as_they_can_be(median, spread, max_length, longest_row):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(median), spread, 2000).astype(int), 2, max_length)
    packing = make_packing(lengths, 4, max_length)
    filled = np.bincount(packing.row_of, np.sort(lengths - 1)[::-1])
    assert filled.max() <= packing.row_length <= longest_row
    assert len(filled) == packing.n_rows
    assert packing.fullness == pytest.approx(filled.sum() / (len(filled) * packing.row_length))
    assert packing.fullness > 0.95
    n_tokens = packing.batch_rows * packing.row_length
    assert n_tokens == pytest.approx(4 * max_length, rel=0.05)


def test_a_million_texts_are_packed_within_seconds():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 1, 1_000_000).astype(int), 2, 2048)
    start = time.process_time()
    assert make_packing(lengths, 4, 2048).fullness > 0.99
    assert time.process_time() - start < 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory, docstrings) -> Path:
    """Data of short texts, and of short prompts."""
    folder = tmp_path_factory.mktemp("short")
    for name, texts in ("train", docstrings[:40]), ("valid", docstrings[40:44]):
        write_jsonl(folder / f"{name}.jsonl", texts)
    (folder / "prompts").mkdir()
    for name in ("train", "valid"):
        texts = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
        pairs = [{"prompt": t["text"][:15], "completion": t["text"][15:]} for t in texts]
        (folder / "prompts" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


def texts_of(batch: tuple[mx.array, ...]) -> list[tuple[int, ...]]:
    """The texts of a packed batch, but for the first token of each."""
    inputs, targets, lengths = map(np.array, batch)
    texts = []
    for row, labels, n in zip(inputs, targets, lengths, strict=True):
        assert (labels[n:] == -1).all()
        starts = np.flatnonzero(row[:n, 1] == 0)
        texts += [tuple(part.tolist()) for part in np.split(labels[:n], starts[1:])]
    return texts


def test_an_epoch_holds_each_text_once_and_whole(tiny_model, folder):
    _, tokenizer = lora.load_model(tiny_model)
    dset = lora.Dataset(folder / "train.jsonl")
    rows = dset.encode(tokenizer)
    whole = {tuple(rows[i][1:].tolist()) for i in range(len(rows))}
    n = make_packing(rows.lengths, 2, 150).n_batches

    def batches(first: int, last: int, seed: int = 3) -> list[list[tuple[int, ...]]]:
        options = {"train": True, "seed": seed, "skip": first, "pack": 150}
        found = lora.iterate_batches(dset, tokenizer, 2, **options)
        return [texts_of(batch) for batch in itertools.islice(found, last - first)]

    every = batches(0, 2 * n)
    epochs = [list(itertools.chain(*every[i : i + n])) for i in (0, n)]
    for texts in epochs:
        assert len(texts) == len(set(texts)) > 0.8 * len(whole)
        assert set(texts) <= whole
    assert epochs[0] != epochs[1]
    assert every != batches(0, 2 * n, seed=4)
    for skip in (1, n, n + 1):  # as a run that is resumed does
        assert batches(skip, 2 * n) == every[skip:]


# -------------------------------------------------------------------------------------------------
# What the network makes of them


@pytest.fixture(params=NETWORKS)
def model(request, monkeypatch) -> Model:
    """With blocks of a few queries, of which a row has several."""
    monkeypatch.setattr(ops_cpu, "QUERY_BLOCK", 16)
    mx.random.seed(1)
    model = Model(ModelArgs(**{**QUICK, **NETWORKS[request.param]}))
    add_lora(model, [1, 2], ["wq", "wv", "w1"], dropout=0.2)
    for layer in model.layers[1:]:
        for linear in (layer.attention.wq, layer.attention.wv, layer.feed_forward.w1):
            linear.lora_b = 0.1 * mx.random.normal(linear.lora_b.shape)
    return model


@pytest.fixture(params=[True, False], ids=["CPU", "Metal"])
def on_cpu(request, monkeypatch) -> None:
    if device.TURNED and request.param:
        pytest.skip("a CPU in Metal's place")
    monkeypatch.setattr(device, "ON_CPU", request.param)


def random_rows(seed: int = 0) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(3, QUICK["vocab_size"], n).astype(np.int32)  # noqa: E731
    return [[draw(n) for n in texts] for texts in LENGTHS]


def losses_of(model: Model, rows: list[list[np.ndarray]]) -> list[np.ndarray]:
    """The losses of each text's tokens, in packed rows."""
    inputs, targets, _ = pack_batch(rows, ROW_LENGTH)
    x, _ = model.hidden(inputs)
    losses = np.array(ops.linear_cross_entropy(x, model.output_weight, targets, False))
    ends = [np.cumsum([len(text) - 1 for text in texts]) for texts in rows]
    return [part for row, end in zip(losses, ends, strict=True) for part in np.split(row, end)[:-1]]


def test_each_text_has_the_losses_that_it_has_alone(model, on_cpu):
    rows = random_rows()
    texts = list(itertools.chain(*rows))
    for losses, text in zip(losses_of(model, rows), texts, strict=True):
        alone = ops.cross_entropy(model(mx.array(text[None, :-1]))[0], mx.array(text[None, 1:]))
        np.testing.assert_allclose(losses, alone[0], atol=1e-5, rtol=0)


def test_no_text_sees_another(model, on_cpu):
    rows, changed = random_rows(), random_rows()
    changed[0][1] = random_rows(1)[0][1]
    before, after = losses_of(model, rows), losses_of(model, changed)
    same = [np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [True, False, True, True, True, True, True]


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_are_those_of_the_texts_alone(model, on_cpu, checkpoint):
    rows = random_rows()
    model.train()
    model.grad_checkpoint = checkpoint

    def total(batch: tuple[mx.array, ...]) -> np.ndarray:
        matrices = model.trainable_parameters()
        (value, n_tokens), tree = nn.value_and_grad(model, lora.loss)(model, *batch)
        model.update(matrices)
        return np.array(mx.concatenate([to_vector(tree), value[None]]) * n_tokens)

    packed = total(pack_batch(rows, ROW_LENGTH))
    alone = sum(total(pad_batch([text], len(text) - 1)) for text in itertools.chain(*rows))
    np.testing.assert_allclose(packed, alone, atol=1e-4, rtol=1e-4)
    assert np.abs(packed).max() > 1


def test_rows_are_split_among_ranks_and_streams_with_their_dropout(model):
    model.train()
    batch = pack_batch(random_rows(), ROW_LENGTH)
    (batch,) = dropout.add_keys(iter([batch]), 0.2, 5, 0)
    compute = dropout.with_keys(nn.value_and_grad(model, lora.loss))

    def total(*rows: mx.array) -> mx.array:
        matrices = model.trainable_parameters()
        (value, n_tokens), tree = compute(model, *rows)
        model.update(matrices)
        return mx.concatenate([to_vector(tree), value[None]]) * n_tokens

    streams = device.open_streams(2)
    ranks = [SimpleNamespace(rank=rank, size=2) for rank in range(2)]
    parts = [on_each_stream(streams, total, *batch, ranks=each) for each in ranks]
    summed = sum(itertools.chain(*parts))
    np.testing.assert_allclose(summed, total(*batch), atol=1e-4, rtol=1e-4)
    assert not np.allclose(summed, total(*batch[:-1]), atol=1e-2)


# -------------------------------------------------------------------------------------------------
# Runs


def train(model: Path, data: Path, adapter: Path, *flags):
    return call_script(
        "lora.py", "--model", model, "--data", data, "--train", "--pack", "--adapter-file", adapter,
        "--lora-layers", 2, "--batch-size", 2, "--max-seq-length", 150, "--val-batches", 1,
        "--learning-rate", 1e-2, *flags,
    )  # fmt: skip


def test_a_resumed_run_ends_as_one_never_stopped(tiny_model, folder, tmp_path):
    data, whole, parts = folder / "prompts", tmp_path / "whole.npz", tmp_path / "parts.npz"
    flags = "--mask-prompt", "--lora-dropout", 0.1, "--grad-accumulation", 2, "--grad-checkpoint"
    process = train(tiny_model, data, whole, "--epochs", 1.5, *flags)
    assert process.returncode == 0, process.stderr
    described = r"tokens in (\d+) rows of \d+, 9\d\.\d % full; (\d+) iterations of 2 x (\d+), "
    n_rows, iters, batch_rows = map(int, re.search(described, process.stdout).groups())
    assert iters == math.ceil(1.5 * (n_rows // batch_rows) / 2)
    assert train(tiny_model, data, parts, "--iters", 1, *flags).returncode == 0
    resumed = "--iters", iters, "--resume-adapter-file", parts, *flags
    assert train(tiny_model, data, parts, *resumed).returncode == 0
    assert parts.read_bytes() == whole.read_bytes()
    process = train(tiny_model, data, parts, *resumed, "--max-seq-length", 140)
    assert process.returncode == 2
    assert "--max-seq-length is not that of the run in" in process.stderr


def test_a_batch_that_holds_all_texts_is_a_warning(tiny_model, folder, tmp_path):
    flags = "--batch-size", 500, "--iters", 1
    process = train(tiny_model, folder, tmp_path / "a.npz", *flags)
    assert "a batch is 40 texts, since there are no more for training" in process.stderr
    assert " % full; 1 iterations of " in process.stdout
