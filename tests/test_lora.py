"""Data, loss, training, generation and errors of lora.py, on a small random model."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
import safetensors.numpy
from conftest import (
    MISTRAL_TOKENIZER,
    ON_DEVICE,
    QUICK,
    ROOT,
    RUN_FILES,
    TINY,
    call_script,
    run_script,
    write_jsonl,
    write_model,
)
from sentencepiece import sentencepiece_model_pb2

from parts import decoder, device  # before MLX, for its BLAS
from parts.adapters import read_adapter
from parts.decoder import generate_step
from parts.files import decode_text
from parts.model_folder import count_parameters
from parts.run_files import is_plot, sibling
from parts.sampling import Sampling

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

import lora
from models import Model, ModelArgs, add_lora, quantizable, top_layers

TOKENIZER = lora.Tokenizer(MISTRAL_TOKENIZER)


# -------------------------------------------------------------------------------------------------
# Data


def dataset(tmp_path, texts) -> lora.Dataset:
    write_jsonl(tmp_path / "texts.jsonl", texts)
    return lora.Dataset(tmp_path / "texts.jsonl")


def sequences(batches) -> list[tuple[int, ...]]:
    """The token sequences of batches, without their padding, sorted."""
    rows = []
    for inputs, targets, lengths in batches:
        for row, target, length in zip(inputs, targets, lengths.tolist(), strict=True):
            assert row[1:length].tolist() == target[: length - 1].tolist()
            rows.append((row[0].item(), *target[:length].tolist()))
    return sorted(rows)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 64])
def test_evaluation_batches_hold_every_record_once(tmp_path, docstrings, batch_size):
    dset = dataset(tmp_path, docstrings[:26])
    expected = sorted(tuple(TOKENIZER.encode(text, eos=True)) for text in docstrings[:26])
    assert sequences(lora.iterate_batches(dset, TOKENIZER, batch_size)) == expected


def test_every_training_epoch_has_an_order_of_its_own_which_the_seed_decides(tmp_path, docstrings):
    dset = dataset(tmp_path, docstrings[:24])

    def epochs(seed):
        batches = lora.iterate_batches(dset, TOKENIZER, 4, train=True, seed=seed)
        return [[next(batches)[0].tolist() for _ in range(6)] for _ in range(2)]

    assert epochs(0) == epochs(0)
    assert epochs(0) != epochs(1)
    first, second = epochs(0)
    assert first != second
    assert sorted(len(row) for batch in first for row in batch) == sorted(
        len(row) for batch in second for row in batch
    )


def test_training_leaves_out_other_records_in_each_epoch(tmp_path, docstrings):
    dset = dataset(tmp_path, docstrings[:10])
    batches = lora.iterate_batches(dset, TOKENIZER, 4, train=True)
    seen = [sequences(next(batches) for _ in range(2)) for _ in range(20)]
    assert all(len(set(epoch)) == 8 for epoch in seen)
    assert len({row for epoch in seen for row in epoch}) == 10


def test_at_most_a_twentieth_of_what_an_epoch_computes_is_padding(tmp_path):
    run_script("cwk_create_dataset.py", "mlx", "--data-folder", str(tmp_path))
    dset = lora.Dataset(tmp_path / "train.jsonl")
    epoch = islice(lora.iterate_batches(dset, TOKENIZER, 4, train=True), len(dset) // 4)
    shapes = [(*inputs.shape, sum(lengths.tolist())) for inputs, _, lengths in epoch]
    computed = sum(rows * length for rows, length, _ in shapes)
    assert sum(real for *_, real in shapes) >= 0.95 * computed
    assert len({length for _, length, _ in shapes}) <= 40


def test_a_data_set_is_tokenized_once(tmp_path, docstrings):
    class CountingTokenizer(lora.Tokenizer):
        calls = 0

        def encode_batch(self, texts, **options):
            self.calls += len(texts)
            return super().encode_batch(texts, **options)

    tokenizer = CountingTokenizer(MISTRAL_TOKENIZER)
    batches = lora.iterate_batches(dataset(tmp_path, docstrings[:8]), tokenizer, 4, train=True)
    for _ in range(10):
        next(batches)
    assert tokenizer.calls == 8


# -------------------------------------------------------------------------------------------------
# Loss and evaluation


def load_tiny(folder):
    model, tokenizer = lora.load_model(folder, mx.float32)
    return model, tokenizer


def loss_by_hand(model, tokenizer, texts) -> float:
    """Mean cross-entropy a token, record by record, with NumPy in float64."""
    losses = []
    for text in texts:
        ids = tokenizer.encode(text, eos=True)
        logits = np.array(model(mx.array([ids[:-1]]))[0][0]).astype(np.float64)
        log_z = np.log(np.exp(logits).sum(-1))
        losses += list(log_z - logits[np.arange(len(ids) - 1), ids[1:]])
    return float(np.mean(losses))


def test_masked_positions_do_not_move_the_loss(tiny_model):
    model, _ = load_tiny(tiny_model)
    inputs, targets = mx.array([[1, 5, 6, 7], [1, 8, 9, 0]]), mx.array([[5, 6, 7, 2], [8, 2, 0, 0]])
    lengths = mx.array([4, 2])
    value, n_tokens = lora.loss(model, inputs, targets, lengths)
    other = mx.array([[5, 6, 7, 2], [8, 2, 31, 17]])
    assert n_tokens.item() == 6
    assert lora.loss(model, inputs, other, lengths)[0].item() == value.item()
    longer = lora.loss(
        model, mx.pad(inputs, [(0, 0), (0, 5)]), mx.pad(targets, [(0, 0), (0, 5)]), lengths
    )
    assert longer[0].item() == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 64])
def test_the_whole_set_gives_the_loss_computed_record_by_record(
    tiny_model, tmp_path, docstrings, batch_size
):
    model, tokenizer = load_tiny(tiny_model)
    dset = dataset(tmp_path, docstrings[:7])
    value = lora.evaluate(model, dset, lora.loss, tokenizer, batch_size, -1)
    assert value == pytest.approx(loss_by_hand(model, tokenizer, docstrings[:7]), rel=1e-5)


def test_recomputed_layers_give_the_same_gradients(tiny_model):
    model, _ = load_tiny(tiny_model)
    add_lora(model, [0, 1, 2])
    batch = mx.array([[1, 5, 6, 7]]), mx.array([[5, 6, 7, 2]]), mx.array([4])
    gradients = []
    for model.grad_checkpoint in (False, True):
        _, tree = nn.value_and_grad(model, lora.loss)(model, *batch)
        gradients.append({name: np.array(value) for name, value in tree_flatten(tree)})
    for name, value in gradients[0].items():
        np.testing.assert_array_equal(gradients[1][name], value)


# -------------------------------------------------------------------------------------------------
# Layers


@pytest.mark.parametrize(
    ("asked", "chosen"), [(1, [2]), (2, [1, 2]), (3, [0, 1, 2]), (16, [0, 1, 2])]
)
def test_the_top_layers_are_chosen_and_never_more_than_there_are(asked, chosen):
    model = Model(ModelArgs(**TINY))
    assert top_layers(model, asked) == chosen


def test_only_lora_matrices_are_trained():
    model = Model(ModelArgs(**TINY))
    add_lora(model, [1, 2])
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert names == {
        f"layers.{i}.attention.{w}.lora_{m}" for i in (1, 2) for w in ("wq", "wv") for m in "ab"
    }


def test_activations_after_an_adapter_stay_half_precision(tiny_model):
    model, _ = lora.load_model(tiny_model, mx.float16)
    add_lora(model, [0, 1, 2])
    logits, cache = model(mx.array([[1, 2, 3]]))
    assert logits.dtype == mx.float16
    assert all(layer.keys.dtype == layer.values.dtype == mx.float16 for layer in cache)


def test_a_quantized_layer_counts_as_the_layer_that_it_was():
    model = Model(ModelArgs(**TINY))
    expected = sum(value.size for _, value in tree_flatten(model.parameters()))
    nn.quantize(model, 32, 3, class_predicate=lambda name, m: isinstance(m, nn.Linear))
    assert count_parameters(model) == expected


# -------------------------------------------------------------------------------------------------
# The script


def train_script(model, data, *flags, run=call_script, **options):
    return run(
        "lora.py",
        "--model",
        model,
        "--data",
        data,
        "--train",
        "--learning-rate",
        1e-2,
        *flags,
        **options,
    )


@pytest.fixture(scope="module")
def trained(tiny_model, data, tmp_path_factory):
    """A training run of twelve steps: the process and its adapter file."""
    adapter = tmp_path_factory.mktemp("trained") / "adapters.npz"
    process = train_script(
        tiny_model, data, "--iters", 12, "--lora-layers", 2, "--steps-per-report", 5,
        "--steps-per-eval", 6, "--adapter-file", adapter, "--test", run=run_script,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process, adapter


def test_training_prints_the_lines_that_log_readers_rely_on(trained):
    lines = trained[0].stdout.splitlines()
    patterns = [
        r"Loading pretrained model",
        r"Total parameters 0\.\d{3}M",
        r"Trainable parameters 0\.004M",
        r"Loading datasets",
        r"Training",
        rf"{ON_DEVICE}: LoRA of rank 8 in wq wv of 2 of 3 layers; 24 texts, \d+ tokens; "
        r"12 iterations of 4, 2.00 epochs",
        r"Iter 1: Val loss \d+\.\d{3}, Val took \d+\.\d{3}s",
        r"Iter 5: Train loss \d+\.\d{3}, It/sec \d+\.\d{3}, Tokens/sec \d+\.\d{3}",
        r"Iter 6: Val loss \d+\.\d{3}, Val took \d+\.\d{3}s",
        r"Iter 6: lowest validation loss so far, saved to \S+adapters.best.npz",
        r"Iter 10: Train loss \d+\.\d{3}, It/sec \d+\.\d{3}, Tokens/sec \d+\.\d{3}",
        r"Iter 12: Train loss \d+\.\d{3}, It/sec \d+\.\d{3}, Tokens/sec \d+\.\d{3}",
        r"Iter 12: Val loss \d+\.\d{3}, Val took \d+\.\d{3}s",
        r"Iter 12: lowest validation loss so far, saved to \S+adapters.best.npz",
        r"Peak memory \d\.\d{3} GB",
        r"Testing",
        r"Test loss \d+\.\d{3}, Test ppl \d+\.\d{3}\.",
    ]
    assert len(lines) == len(patterns), lines
    for pattern, line in zip(patterns, lines, strict=True):
        assert re.fullmatch(pattern, line), line
    assert trained[0].stderr == ""


@pytest.mark.parametrize("name", ["a", "a.v1", "a.v2"])
def test_each_adapter_has_a_log_of_its_own(name):
    assert sibling(f"in/{name}.npz", ".log.jsonl") == Path(f"in/{name}.log.jsonl")
    assert sibling(f"in/{name}", ".png") == Path(f"in/{name}.png")


def test_training_keeps_a_log_and_draws_it(trained):
    log = trained[1].with_suffix(".log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in log]
    keys = [
        "iteration", "loss", "val_loss", "learning_rate", "tokens_per_second", "tokens",
        "peak_memory_gb", "time",
    ]  # fmt: skip
    assert all(list(entry) == keys for entry in entries)
    lines = re.findall(r"Iter (\d+): (Train|Val) loss (\S+),", trained[0].stdout)
    for entry, (iteration, kind, loss) in zip(entries, lines, strict=True):
        value, other = entry["loss"], entry["val_loss"]
        if kind == "Val":
            value, other = other, value
        assert (entry["iteration"], f"{value:.3f}", other) == (int(iteration), loss, None)
    (n_tokens,) = re.findall(r"texts, (\d+) tokens", trained[0].stdout)
    assert entries[-1]["tokens"] == 2 * int(n_tokens)
    height, width, _ = matplotlib.image.imread(trained[1].with_suffix(".png")).shape
    assert (width, height) == (960, 600)


def test_what_makes_no_sense_together_is_a_warning(tiny_model, data, tmp_path, docstrings):
    folder = shutil.copytree(data, tmp_path / "data")
    write_jsonl(folder / "valid.jsonl", docstrings[:30])
    process = train_script(
        tiny_model, folder, "--iters", 5, "--learning-rate", 0.5, "--adapter-file",
        tmp_path / "a.npz",
    )  # fmt: skip
    assert process.returncode == 0
    assert process.stderr.splitlines() == [
        "lora.py: warning: --iters 5 does not finish an epoch, which has 6",
        "lora.py: warning: the validation set has 30 texts, the training set 24",
        "lora.py: warning: --learning-rate 0.5 is high: 1e-5 to 1e-3 are usual for LoRA",
    ]


def test_a_picture_that_cannot_be_written_does_not_stop_training(tiny_model, data, tmp_path):
    (tmp_path / "a.png").mkdir()
    (tmp_path / "a.log.jsonl").mkdir()
    process = train_script(tiny_model, data, "--iters", 6, "--adapter-file", tmp_path / "a.npz")
    assert process.returncode == 0
    assert "a.log.jsonl could not be written" in process.stderr
    assert "a.png could not be written" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_notebooks_way_of_drawing_is_not_needed(tiny_model, data, tmp_path):
    flags = "--iters", 6, "--adapter-file", tmp_path / "a.npz"
    process = train_script(
        tiny_model, data, *flags, run=run_script, MPLBACKEND="module://nobody.has_it"
    )
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "a.png").is_file()


def test_training_replaces_no_file_that_holds_anything_else(tiny_model, data, tmp_path):
    weights = shutil.copy(tiny_model / "weights.npz", tmp_path)
    null = tmp_path / "null"
    null.symlink_to("/dev/null")
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(Path(weights).read_bytes()[-1000:])
    for file in (weights, null, damaged, shutil.copy(data / "train.jsonl", tmp_path)):
        process = train_script(tiny_model, data, "--iters", 6, "--adapter-file", file)
        assert process.returncode == 2
        assert f"--adapter-file {file} exists and holds no adapters" in process.stderr
    assert Path(weights).read_bytes() == (tiny_model / "weights.npz").read_bytes()


@pytest.mark.parametrize("suffix", [".best.npz", ".png", ".log.jsonl", ".state.npz"])
def test_training_replaces_nothing_of_anybodys_beside_the_adapters(
    tiny_model, data, tmp_path, suffix
):
    theirs = tmp_path / f"photo{suffix}"
    theirs.write_text("somebody's")
    before = theirs.read_bytes()
    says = error_of(
        "--model", tiny_model, "--data", data, "--train", "--adapter-file", tmp_path / "photo.npz"
    )
    assert f"would replace {theirs}, which no training made: name another" in says
    assert [path.name for path in tmp_path.iterdir()] == [theirs.name]
    assert theirs.read_bytes() == before


def test_training_says_which_files_of_another_run_it_replaces(trained, tiny_model, data, tmp_path):
    for file in RUN_FILES:
        shutil.copy(trained[1].with_name(file), tmp_path)
    flags = "--iters", 12, "--lora-layers", 2, "--adapter-file", tmp_path / "adapters.npz"
    process = train_script(tiny_model, data, *flags)
    assert process.stderr.splitlines() == [
        f"lora.py: warning: another run's files are replaced: {tmp_path / 'adapters.npz'}, "
        "adapters.best.npz, adapters.state.npz, adapters.log.jsonl, adapters.png"
    ]
    before = (tmp_path / "adapters.npz").read_bytes()
    resumed = train_script(
        tiny_model, data, *flags, "--resume-adapter-file", tmp_path / "adapters.npz"
    )
    assert resumed.stderr == ""  # these are its own
    assert (tmp_path / "adapters.npz").read_bytes() == before


def test_a_plot_is_a_trainings_by_its_signature_or_its_log(trained, tmp_path):
    plot = Path(shutil.copy(trained[1].with_suffix(".png"), tmp_path / "a.png"))
    assert is_plot(plot)
    matplotlib.figure.Figure().savefig(plot)  # as earlier versions, which did not sign it
    assert not is_plot(plot)
    shutil.copy(trained[1].with_suffix(".log.jsonl"), tmp_path / "a.log.jsonl")
    assert is_plot(plot)


def test_names_that_are_not_utf_8_are_names(tiny_model, tmp_path):
    folder = os.fsencode(tmp_path) + b"/mod\xe8le"
    try:
        shutil.copytree(os.fsencode(tiny_model), folder)
    except OSError as error:
        pytest.skip(f"this file system has no such names: {error}")
    process = run_script(
        "lora.py", "--model", os.fsdecode(folder), "--no-adapter", "--prompt", "hi", "-n", 2
    )
    assert process.returncode == 0, process.stderr


def test_training_lowers_the_loss(trained):
    losses = [float(loss) for loss in re.findall(r"Val loss (\S+),", trained[0].stdout)]
    assert losses[-1] < losses[0] - 0.1


def test_the_adapter_file_holds_the_lora_matrices_and_nothing_else(trained):
    with np.load(trained[1]) as file:
        shapes = {name: (file[name].shape, file[name].dtype) for name in file.files}
    f32 = np.dtype(np.float32)
    expected = {}
    for i in (1, 2):
        expected[f"layers.{i}.attention.wq.lora_a"] = (64, 8), f32
        expected[f"layers.{i}.attention.wq.lora_b"] = (8, 64), f32
        expected[f"layers.{i}.attention.wv.lora_a"] = (64, 8), f32
        expected[f"layers.{i}.attention.wv.lora_b"] = (8, 32), f32
    assert shapes == expected


def test_one_seed_gives_the_same_adapters_byte_for_byte(tiny_model, data, tmp_path):
    files = []
    for i, (seed, run) in enumerate([(3, run_script), (3, call_script), (4, call_script)]):
        files.append(tmp_path / f"{i}.npz")
        process = train_script(
            tiny_model, data, "--iters", 3, "--seed", seed, "--adapter-file", files[-1], run=run
        )
        assert process.returncode == 0, process.stderr
    same, again, other = (file.read_bytes() for file in files)
    assert same == again
    assert same != other


def test_an_adapter_is_used_with_the_layers_that_it_was_trained_on(trained, tiny_model, data):
    """Trained with two layers, tested without the flag: the loss is the one that training saw."""
    process = call_script(
        "lora.py", "--model", tiny_model, "--data", data, "--test", "--adapter-file", trained[1]
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == trained[0].stdout.splitlines()[-1]


def test_the_base_model_is_tested_without_an_adapter(trained, tiny_model, data, docstrings):
    process = call_script(
        "lora.py", "--model", tiny_model, "--data", data, "--test", "--no-adapter", "--dtype",
        "float32",
    )  # fmt: skip
    value = float(re.search(r"Test loss (\S+),", process.stdout)[1])
    expected = loss_by_hand(*load_tiny(tiny_model), docstrings[31:38])
    assert value == pytest.approx(expected, abs=1e-3)


def test_adapters_without_a_state_are_the_start_of_a_new_run(trained, tiny_model, data, tmp_path):
    adapter = tmp_path / "alone.npz"
    shutil.copy(trained[1], adapter)
    process = train_script(
        tiny_model, data, "--iters", 1, "--resume-adapter-file", adapter,
        "--adapter-file", tmp_path / "more.npz",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "A new run begins from the weights" in process.stdout
    before = re.findall(r"Val loss (\S+),", trained[0].stdout)[-1]
    assert re.findall(r"Val loss (\S+),", process.stdout)[0] == before
    assert "Trainable parameters 0.004M" in process.stdout


def test_adapters_are_saved_while_training_goes_on(tiny_model, data, tmp_path):
    adapter = tmp_path / "adapters.npz"
    command = [
        sys.executable, ROOT / "lora.py", "--model", tiny_model, "--data", data, "--train",
        "--iters", "100000", "--save-every", "2", "--adapter-file", adapter, "--val-batches", "1",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not adapter.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(read_adapter(adapter)) == 12


def test_ctrl_c_exits_with_130(tiny_model, data, tmp_path):
    command = [
        sys.executable, ROOT / "lora.py", "--model", tiny_model, "--data", data, "--train",
        "--iters", "100000", "--adapter-file", tmp_path / "a.npz", "--steps-per-report", "1",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if "Train loss" in line:
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_generated_text_follows_the_prompt_and_nothing_else_does(tiny_model, tmp_path):
    """Run where there is no data set."""
    process = run_script(
        "lora.py", "--model", tiny_model, "--no-adapter", "-p", "A llama 🦙", "-n", 9, "--temp", 0,
        "--dtype", "float32", cwd=tmp_path,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    model, tokenizer = load_tiny(tiny_model)
    ids = tokenizer.encode("A llama 🦙")
    for _ in range(9):
        ids.append(int(model(mx.array([ids]))[0][0, -1].argmax()))
    head, text = process.stdout.split("Generating\n")
    assert text == tokenizer.decode(ids) + "\n"
    assert head.splitlines() == ["Loading pretrained model", "Total parameters 0.221M"]
    assert re.fullmatch(
        r"Prompt: 11 tokens, [\d.]+ tokens/sec; generation: 9 tokens, [\d.]+ tokens/sec; "
        r"peak memory 0\.\d{3} GB\n",
        process.stderr,
    )


def test_a_prompt_is_read_from_standard_input(tiny_model):
    flags = ("--model", tiny_model, "--no-adapter", "-n", "5", "--temp", "0", "--prompt")
    given = call_script("lora.py", *flags, "Two\nlines 🦙")
    read = subprocess.run(
        [sys.executable, ROOT / "lora.py", *flags, "-"],
        input="Two\nlines 🦙",
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert read.stdout == given.stdout


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (b"Q: What?\nA:\n", "Q: What?\nA:"),
        (b"\xef\xbb\xbfQ: What?\r\nA:\r\n", "Q: What?\nA:"),
        (b"Q: What?\n\n", "Q: What?\n"),
        (b"Q: What?", "Q: What?"),
    ],
)
def test_what_only_an_editor_writes_is_no_part_of_a_prompt(content, prompt):
    assert decode_text(content, "--prompt") == prompt


def test_a_prompts_file_is_answered_as_its_text_is_and_a_text_stays_as_it_is(tiny_model):
    flags = ("--model", tiny_model, "--no-adapter", "-n", "5", "--temp", "0", "--prompt")
    command = [sys.executable, ROOT / "lora.py", *flags, "-"]
    file = b"\xef\xbb\xbfQ: What?\r\nA:\r\n"
    read = subprocess.run(command, input=file, capture_output=True, check=True).stdout.decode()
    assert read == call_script("lora.py", *flags, "Q: What?\nA:").stdout
    given = call_script("lora.py", *flags, "A:\r\n")
    (_, head, text) = given.stdout.replace("\r\n", "\n").partition("Generating\nA:\n")
    assert head and text
    process = subprocess.run(command, input=b"\xff", capture_output=True)
    assert process.returncode == 2
    assert process.stderr.startswith(b"lora.py: error: --prompt is not valid UTF-8: ")


def test_one_token_alone_has_no_speed(tiny_model):
    process = call_script("lora.py", "--model", tiny_model, "--no-adapter", "-p", "hi", "-n", 1)
    assert re.search(r"; generation: 1 tokens; peak memory", process.stderr)


def test_a_long_prompt_goes_through_in_pieces(tiny_model, monkeypatch):
    model, tokenizer = load_tiny(tiny_model)
    ids = tokenizer.encode("All about llamas. " * 10)
    whole = list(islice(generate_step(model, ids), 8))
    for pieces in (1, 7, len(ids) - 1, len(ids)):
        monkeypatch.setattr(decoder, "PREFILL_STEP", pieces)
        assert list(islice(generate_step(model, ids), 8)) == whole


def test_a_model_with_more_ids_than_the_tokenizer_gives_none_that_it_lacks(tmp_path):
    padded = Model(ModelArgs(**{**TINY, "vocab_size": 64000}))  # half of the ids have no text
    folder = write_model(tmp_path, padded, vocab_size=64000)
    process = call_script(
        "lora.py", "--model", folder, "--no-adapter", "--prompt", "hi", "-n", "40", "--temp", "5"
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("temp", [1e-5, 1e-29, 1e-45, 5e-324])
def test_next_to_no_temperature_is_greedy(tiny_model, temp):
    model, tokenizer = load_tiny(tiny_model)
    ids = tokenizer.encode("Hello")
    greedy = list(islice(generate_step(model, ids), 8))
    assert list(islice(generate_step(model, ids, Sampling(temp)), 8)) == greedy


def test_logits_that_are_not_finite_are_a_failure_and_no_text(tmp_path):
    model = Model(ModelArgs(**TINY))
    model.norm.weight = model.norm.weight * math.nan
    folder = write_model(tmp_path, model)
    process = call_script("lora.py", "--model", folder, "--no-adapter", "--prompt", "hi")
    assert process.returncode == 1
    assert process.stderr.startswith("lora.py: error: the model's logits are not finite")


def test_a_closed_standard_stream_is_no_traceback(tiny_model):
    flags = ("--model", tiny_model, "--no-adapter", "-n", "2", "--prompt")
    command = shlex.join(map(str, (sys.executable, ROOT / "lora.py", *flags)))
    for redirected, status in ((f"{command} hi >&-", 0), (f"{command} - <&-", 2)):
        process = subprocess.run(["bash", "-c", redirected], stderr=subprocess.PIPE, text=True)
        assert process.returncode == status, process.stderr
        assert "Traceback" not in process.stderr


def test_a_terminal_without_unicode_shows_what_it_can(tiny_model):
    process = run_script(
        "lora.py", "--model", tiny_model, "--no-adapter", "--prompt", "é🦙", "-n", "2",
        PYTHONIOENCODING="ascii",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "Generating\n??" in process.stdout


def test_generating_does_not_copy_the_cache(tiny_model):
    """On a CPU a copy, 1 MB a layer for keys and values here, would show in the peak."""
    model, tokenizer = load_tiny(tiny_model)
    ids = generate_step(model, [tokenizer.eos_id] * 3500)
    for _ in range(2):
        next(ids)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(20):
        next(ids)
    cache = 3 * 2 * 2 * 16 * 4 * 3584  # layers, keys and values, heads, head_dim, bytes, positions
    assert mx.get_peak_memory() - before < cache / 2


def test_generating_leaves_the_adapters_as_they_were(tiny_model, capsys):
    model, tokenizer = lora.load_model(tiny_model, mx.bfloat16)
    add_lora(model, [2])
    before = dict(tree_flatten(model.trainable_parameters()))
    lora.generate(model, "Hello", tokenizer, lora.build_parser().parse_args(["-n", "2"]))
    after = dict(tree_flatten(model.trainable_parameters()))
    assert {name: value.dtype for name, value in after.items()} == dict.fromkeys(before, mx.float32)
    assert all(mx.array_equal(before[name], after[name]) for name in before)


def test_a_path_with_a_spelling_mistake_gets_a_suggestion(tiny_model, data, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "llama-mlx")
    line = error_of("--model", tmp_path / "lama-mlx", "--no-adapter", "--prompt", "hi")
    assert f"(did you mean {model}?)" in line
    shutil.copytree(data, tmp_path / "my-data")
    line = error_of("--model", model, "--no-adapter", "--test", "--data", tmp_path / "my-dta")
    assert f"(did you mean {tmp_path / 'my-data'}?)" in line
    (tmp_path / "adapters.npz").touch()
    line = error_of("--model", model, "--prompt", "hi", "--adapter-file", tmp_path / "adapter.npz")
    assert f"(did you mean {tmp_path / 'adapters.npz'}?)" in line


def test_a_reader_who_leaves_ends_the_run_without_a_word(tiny_model):
    command = [sys.executable, ROOT / "lora.py", "--model", tiny_model, "--no-adapter", "-p", "a"]
    with subprocess.Popen(
        [*command, "-n", "5000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 1
    assert errors == ""


def test_sampled_text_depends_on_the_seed_alone(tiny_model):
    def text(run, seed):
        return run(
            "lora.py", "--model", tiny_model, "--no-adapter", "-p", "a", "-n", 9, "--seed", seed
        ).stdout  # fmt: skip

    assert text(call_script, 1) == text(run_script, 1)
    assert text(call_script, 1) != text(call_script, 2)


def constant_model(folder, token):
    """A model that always predicts `token`."""
    model = Model(ModelArgs(**TINY))
    for layer in model.layers:
        layer.attention.wo.weight = mx.zeros_like(layer.attention.wo.weight)
        layer.feed_forward.w2.weight = mx.zeros_like(layer.feed_forward.w2.weight)
    model.tok_embeddings.weight = mx.ones_like(model.tok_embeddings.weight)
    model.output.weight = mx.zeros_like(model.output.weight).at[token].add(1.0)
    return write_model(folder, model)


def test_generation_stops_at_the_end_token(tmp_path):
    folder = constant_model(tmp_path, TOKENIZER.eos_id)
    process = call_script("lora.py", "--model", folder, "--no-adapter", "-p", "hi")
    assert process.stdout.endswith("Generating\nhi\n")


def test_text_is_written_every_so_many_tokens(tmp_path, capsys, monkeypatch):
    folder = constant_model(tmp_path, TOKENIZER.encode("the")[1])
    model, tokenizer = load_tiny(folder)
    written = []
    monkeypatch.setattr(sys.stdout, "write", written.append)
    flags = ["-n", "8", "--temp", "0", "--write-every", "3"]
    lora.generate(model, "Say", tokenizer, lora.build_parser().parse_args(flags))
    assert [piece for piece in written if "the" in piece] == [" the the the"] * 2 + [" the the"]


# -------------------------------------------------------------------------------------------------
# Errors


def edited(folder, tmp_path, name, content):
    """A copy of a model folder in which one file has other content; None removes it."""
    copy = tmp_path / "edited"
    copy.mkdir()
    for file in folder.iterdir():
        if file.name != name:
            os.link(file, copy / file.name)
        elif content is not None:
            (copy / name).write_bytes(content)
    return copy


def error_of(*flags) -> str:
    """The one line that a failed call prints; asserts status 2 and no traceback."""
    process = call_script("lora.py", *flags)
    assert process.returncode == 2, process.stdout + process.stderr
    lines = process.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("lora.py: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "give --train, --test, --prompt, --prompts or --chat"),
        (["--train", "--lora-layers", "0"], "--lora-layers: '0' is not a whole number"),
        (["--train", "--iters", "1.5"], "--iters: '1.5' is not a whole number"),
        (["--train", "--learning-rate", "nan"], "--learning-rate: 'nan' is not a number above 0"),
        (["--test", "--test-batches", "0"], "or -1 for all"),
        (["--prompt", "hi", "--temp", "-1"], "--temp: '-1' is not a number of at least 0"),
        (["--prompt", "hi", "--seed", "-1"], "--seed: '-1' is not a whole number from 0"),
        (["--train", "--no-adapter"], "--no-adapter is for --test and --prompt"),
        (["--test", "--resume-adapter-file", "a.npz"], "--resume-adapter-file goes with --train"),
        (["--prompt", "hi", "--adapter-file", "no.npz"], "no adapter file no.npz: make one with"),
        (["--prompt", "hi", "--adapter-file", ""], "no adapter file : make one with"),
        (["--train", "--adapter-file", "no/a.npz"], "folder of --adapter-file no/a.npz does not"),
        (["--prompt", "hi", "--no-adapter", "--model", "nowhere"], "nowhere/params.json is"),
        (["--prompt", "\udcff"], "--prompt is not valid UTF-8"),
        (["--train", "--adapter-file", "a.safetensors"], "writes NumPy's format: name a.npz"),
        (["--train", "--adapter-file", "/"], "--adapter-file / is a folder"),
        (["--tarin"], "unrecognized arguments: --tarin"),
    ],
)  # fmt: skip
def test_a_flag_that_cannot_work_is_one_line(flags, says):
    assert says in error_of(*flags)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("params.json", None, "params.json is missing"),
        ("params.json", b"{", "params.json does not describe a model"),
        ("params.json", b"[]", "params.json does not describe a model"),
        ("params.json", json.dumps({**QUICK, "dim": "64"}).encode(), "does not describe a model"),
        ("params.json", json.dumps({**QUICK, "dim": 32}).encode(), "params.json implies"),
        ("params.json", json.dumps({**QUICK, "head_dim": 2 * 10**9}).encode(), "not describe"),
        ("params.json", json.dumps({**QUICK, "n_layers": 4}).encode(), "lacks layers.3."),
        ("params.json", json.dumps({**QUICK, "vocab_size": 100}).encode(), "has 1000 tokens"),
        ("params.json", json.dumps({"dim": 64}).encode(), "does not describe a model"),
        (
            "params.json",  # MLX divides by zero, which ends the process
            json.dumps({**QUICK, "quantization": {"group_size": 0, "bits": 4}}).encode(),
            "does not describe a model",
        ),
        ("weights.npz", None, "weights.npz is missing"),
        ("weights.npz", b"PK not a zip", "weights.npz is damaged"),
        ("tokenizer.model", None, "tokenizer.model is missing"),
        ("tokenizer.model", b"no tokenizer", "is not a SentencePiece model"),
    ],
)
def test_a_damaged_model_folder_is_one_line(tiny_model, tmp_path, name, content, says):
    folder = edited(tiny_model, tmp_path, name, content)
    assert says in error_of("--model", folder, "--no-adapter", "--prompt", "hi")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "train.jsonl is missing"),
        (b"", "train.jsonl is empty"),
        (b"\n \n", "train.jsonl is empty"),
        (b'{"text": "a"}\n{"text": \n', "train.jsonl, line 2 is not JSON"),
        (b'{"text": "a"}\n\xff\n', "train.jsonl, line 2 is not UTF-8"),
        (
            b'{"answer": "a", "id": 1}\n',
            'line 1 has no text: its keys are "answer", "id"; each',
        ),
        (b'{"messages": [], "id": 1}\n', "line 1 has no messages: its messages is []; each line"),
        (b'{"text": 1}\n', "train.jsonl, line 1 has no text: its text is 1; each line holds one {"),
        (b'{"text": ""}\n', 'train.jsonl, line 1 has no text: its text is ""; each'),
        (b'["text"]\n', "train.jsonl, line 1 has no text: it is a JSON array; each line holds"),
        (b'[\n  {"text": "a"}\n]\n', "train.jsonl, line 1 begins an array of many lines: each"),
        (b'{\n  "text": "a"\n}\n', "train.jsonl, line 1 begins an object of many lines: each"),
        (b'{"text": "\\ud800"}\n', "train.jsonl, line 1 holds half a character"),
    ],
)
def test_malformed_data_is_one_line_that_names_file_and_line(tiny_model, tmp_path, content, says):
    if content is not None:
        (tmp_path / "train.jsonl").write_bytes(content)
    adapter = tmp_path / "a.npz"
    assert says in error_of(
        "--model", tiny_model, "--data", tmp_path, "--train", "--adapter-file", adapter
    )
    assert not adapter.exists()


@pytest.mark.parametrize(
    ("matrices", "says"),
    [
        ({}, "holds no LoRA matrices"),
        ({"layers.0.attention.wx.lora_a": (64, 8)}, "which is no LoRA matrix"),
        ({"layers.9.attention.wq.lora_a": (64, 8)}, "adapts layer 9 of a model that has 3"),
        ({"layers.0.attention.wq.lora_a": (64, 8)}, "lacks layers.0.attention.w"),
        (
            {
                "layers.0.attention.wq.lora_a": (32, 8),
                "layers.0.attention.wq.lora_b": (8, 64),
                "layers.0.attention.wv.lora_a": (32, 8),
                "layers.0.attention.wv.lora_b": (8, 32),
            },
            "the model needs (64, 8)",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_line(tiny_model, tmp_path, matrices, says):
    file = tmp_path / "a.npz"
    np.savez(file, **{name: np.zeros(shape, np.float32) for name, shape in matrices.items()})
    assert says in error_of("--model", tiny_model, "--adapter-file", file, "--prompt", "hi")


@pytest.mark.skipif(
    mx.cuda.is_available() or not (device.working_set() or device.free_memory()),
    reason="needs a device that tells its memory: Linux's CPU, or a Mac's GPU",
)
def test_a_model_that_does_not_fit_the_memory_is_refused_with_the_figure(tiny_model, tmp_path):
    """Its params.json claims two thousand million hidden units, before any shape is compared."""
    content = json.dumps({**QUICK, "hidden_dim": 2**31 - 1}).encode()
    folder = edited(tiny_model, tmp_path, "params.json", content)
    process = run_script("lora.py", "--model", folder, "--no-adapter", "--prompt", "hi")
    assert process.returncode == 1
    assert re.fullmatch(
        r"lora.py: error: the weights take \d+\.\d GiB of memory and \d+\.\d are free.*: .*\n",
        process.stderr,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_that_is_asked_for_is_what_the_weights_take(tmp_path, monkeypatch, dtype):
    model = Model(ModelArgs(**TINY))
    nn.quantize(model, 32, 4, class_predicate=quantizable)
    write_model(tmp_path, model, quantization={"group_size": 32, "bits": 4})
    asked = []
    monkeypatch.setattr(device, "check_memory", asked.append)
    loaded, _ = lora.load_model(tmp_path, getattr(mx, dtype))
    assert asked == [sum(value.nbytes for _, value in tree_flatten(loaded.parameters()))]


def test_adapters_of_any_byte_order_are_read_and_what_float32_does_not_hold_is_one_line(
    tiny_model, trained, tmp_path
):
    with np.load(trained[1]) as archive:
        matrices = dict(archive)
    np.savez(tmp_path / "big-endian.npz", **{n: m.astype(">f4") for n, m in matrices.items()})
    read = read_adapter(tmp_path / "big-endian.npz")
    assert all(np.array_equal(read[name], matrices[name]) for name in matrices)
    huge = {name: np.full(m.shape, 1e300) for name, m in matrices.items()}
    np.savez(tmp_path / "huge.npz", **huge)
    flags = ("--model", tiny_model, "--adapter-file", tmp_path / "huge.npz", "--prompt", "hi")
    assert "is not finite" in error_of(*flags)


def test_a_tokenizer_without_a_beginning_or_end_is_one_line(tiny_model, tmp_path):
    proto = sentencepiece_model_pb2.ModelProto.FromString(MISTRAL_TOKENIZER.read_bytes())
    proto.trainer_spec.bos_piece = "none such"
    folder = edited(tiny_model, tmp_path, "tokenizer.model", proto.SerializeToString())
    assert "no token for the beginning" in error_of(
        "--model", folder, "--no-adapter", "--prompt", "hi"
    )


def test_a_damaged_adapter_file_is_one_line(tiny_model, trained, tmp_path):
    file = tmp_path / "a.npz"
    file.write_bytes(trained[1].read_bytes()[:-100])
    assert "is no adapter file" in error_of(
        "--model", tiny_model, "--adapter-file", file, "--prompt", "hi"
    )


def test_another_tools_adapter_file_is_named(tiny_model, tmp_path):
    file = tmp_path / "adapters.safetensors"
    safetensors.numpy.save_file({"lora_a": np.ones((64, 8), np.float32)}, file)
    assert f"{file} is a safetensors file, as PEFT's and mlx-lm's adapters are" in error_of(
        "--model", tiny_model, "--adapter-file", file, "--prompt", "hi"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_a_full_disk_is_status_1_and_leaves_the_adapter_that_was_there(tiny_model, data, tmp_path):
    """/dev/full stands for the disk: every write to it fails with "no space left"."""
    adapter = tmp_path / "adapters.npz"
    np.savez(adapter, **{"layers.2.attention.wq.lora_a": np.ones((64, 8))})
    before = adapter.read_bytes()
    (tmp_path / "adapters.npz.partial").symlink_to("/dev/full")
    process = train_script(tiny_model, data, "--iters", 6, "--adapter-file", adapter)
    assert process.returncode == 1
    replaced, warning, error = process.stderr.splitlines()
    assert replaced == f"lora.py: warning: another run's files are replaced: {adapter}"
    assert warning.startswith("lora.py: warning: iteration 6 could not be saved to ")
    assert warning.endswith("[Errno 28] No space left on device")
    assert error.startswith("lora.py: error: the adapters of the last step could not be saved")
    assert adapter.read_bytes() == before


def test_perplexity_is_the_exponential_of_the_loss(trained):
    loss, ppl = re.search(r"Test loss (\S+), Test ppl (\S+)\.$", trained[0].stdout, re.M).groups()
    assert float(ppl) == pytest.approx(math.exp(float(loss)), rel=1e-3)
