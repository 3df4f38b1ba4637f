"""Epochs, accumulation, schedules, clipping, weight decay, the best adapters, patience."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call_script, write_jsonl

from parts import device  # before MLX, for its BLAS
from parts.adapters import read_adapter, to_vector
from parts.best import Best
from parts.fingerprint import FORMER_VALUES
from parts.schedules import count_updates, learning_rate, make_optimizer

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

import lora
from models import add_lora


def arguments(*flags) -> object:
    return lora.build_parser().parse_args(["--train", *map(str, flags)])


def train(model: Path, data: Path, adapter: Path, *flags):
    """A training run in this process."""
    return call_script(
        "lora.py", "--model", model, "--data", data, "--train", "--adapter-file", adapter,
        "--learning-rate", 1e-3, *flags,
    )  # fmt: skip


def entries(adapter: Path) -> list[dict]:
    return list(map(json.loads, adapter.with_suffix(".log.jsonl").read_text().splitlines()))


def rates(adapter: Path, steps_per_report: int) -> list[float]:
    """The learning rate of each step, from the log."""
    reports = [entry for entry in entries(adapter) if entry["loss"] is not None]
    return [
        rate
        for entry in reports
        for rate in entry.get("learning_rates", [entry["learning_rate"]] * steps_per_report)
    ]


def prepared(folder: Path, data: Path):
    """A model with adapters whose matrices all have gradients, and a batch of four texts."""
    model, tokenizer = lora.load_model(folder, mx.float32)
    mx.random.seed(1)
    add_lora(model, [0, 1, 2])
    for layer in model.layers:
        for linear in (layer.attention.wq, layer.attention.wv):
            linear.lora_b = 0.1 * mx.random.normal(linear.lora_b.shape)
    batches = lora.iterate_batches(lora.Dataset(data / "train.jsonl"), tokenizer, 4)
    return model, [next(batches) for _ in range(5)]


def vector(model) -> np.ndarray:
    return np.array(to_vector(model.trainable_parameters()))


# -------------------------------------------------------------------------------------------------
# Epochs and accumulation


@pytest.mark.parametrize(
    "flags, n_rows, expected",
    [
        (("--epochs", 2), 24, 12),
        (("--epochs", 2), 27, 12),  # what does not fill a batch is left out
        (("--epochs", 0.1, "--batch-size", 1), 30, 3),
        (("--epochs", 0.01), 24, 1),
        (("--epochs", 1, "--batch-size", 64), 24, 1),
        (("--epochs", 1, "--grad-accumulation", 4), 24, 2),  # all of it is trained on
        (("--iters", 7, "--grad-accumulation", 4), 24, 7),
    ],
)
def test_epochs_are_the_batches_of_the_data(flags, n_rows, expected):
    assert count_updates(arguments(*flags), n_rows) == expected


def test_a_run_of_epochs_ends_where_they_do(tiny_model, data, tmp_path):
    process = train(tiny_model, data, tmp_path / "a.npz", "--epochs", 1.5, "--val-batches", 1)
    assert process.returncode == 0, process.stderr
    assert "; 9 iterations of 4, 1.50 epochs\n" in process.stdout
    assert "Iter 9: Train loss" in process.stdout


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--epochs", 2, "--iters", 1000), "--iters: not allowed with argument --epochs"),
        (("--epochs", 0), "'0' is not a number above 0"),
        (("--iters", 9, "--warmup", 9), "--warmup 9 leaves no update at the full rate, of 9"),
        (("--epochs", 1, "--warmup", 6), "--warmup 6 leaves no update at the full rate, of 6"),
        (("--weight-decay", -1), "'-1' is not a number of at least 0"),
    ],
)
def test_what_cannot_be_is_one_line(tiny_model, data, tmp_path, flags, says):
    process = train(tiny_model, data, tmp_path / "a.npz", *flags)
    (line,) = process.stderr.splitlines()
    assert (process.returncode, says in line) == (2, True), line
    assert list(tmp_path.iterdir()) == []


def test_accumulated_batches_make_the_update_of_the_larger_one(tiny_model, data):
    """Texts of four lengths, weighed by their tokens."""
    results = []
    for n_rows in (4, 1):
        model, batches = prepared(tiny_model, data)
        streams = device.open_streams(n_rows)
        step = lora.make_step(model, optim.Adam(1e-3), lora.loss, streams)
        losses = []
        for batch in batches:
            assert len(set(batch[2].tolist())) > 1
            for first in range(0, 4, n_rows):
                rows = [array[first : first + n_rows] for array in batch]
                result = step(*rows, last=first + n_rows == 4)
            losses.append(result.loss.item())
            assert result.n_tokens.item() == batch[2].sum().item()
        results.append((losses, vector(model)))
    (losses, matrices), (expected, expected_matrices) = results[1], results[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=0)
    np.testing.assert_allclose(matrices, expected_matrices, atol=1e-5, rtol=0)


def test_a_run_with_accumulation_is_that_of_the_larger_batch(
    tiny_model, data, docstrings, tmp_path
):
    folder = shutil.copytree(data, tmp_path / "data")
    write_jsonl(folder / "train.jsonl", docstrings[:4])  # each batch of four holds all
    logs, adapters = [], []
    for name, flags in {
        "whole": ("--batch-size", 4),
        "parts": ("--batch-size", 1, "--grad-accumulation", 4),
    }.items():
        adapter = tmp_path / f"{name}.npz"
        process = train(tiny_model, folder, adapter, "--iters", 4, "--val-batches", -1, *flags)
        assert process.returncode == 0, process.stderr
        logs.append(entries(adapter))
        adapters.append(read_adapter(adapter))
    assert "; 4 iterations of 4 x 1, 4.00 epochs\n" in process.stdout
    assert [entry["tokens"] for entry in logs[1]] == [entry["tokens"] for entry in logs[0]]
    for entry, expected in zip(logs[1], logs[0], strict=True):
        (key,) = {"loss", "val_loss"} & {key for key, value in expected.items() if value}
        assert entry[key] == pytest.approx(expected[key], rel=1e-6)
    for name, matrix in adapters[0].items():
        np.testing.assert_allclose(adapters[1][name], matrix, atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------------
# The update


def test_gradients_are_clipped_as_torch_clips_them(tiny_model, data):
    model, (batch, *_) = prepared(tiny_model, data)
    _, gradients = nn.value_and_grad(model, lora.loss)(model, *batch)
    gradient = np.array(to_vector(gradients))
    norm = float(np.linalg.norm(gradient))
    for max_norm in (norm / 3, norm * 3):
        model, (batch, *_) = prepared(tiny_model, data)
        before = vector(model)
        streams = device.open_streams(2)
        step = lora.make_step(model, optim.SGD(1.0), lora.loss, streams, max_grad_norm=max_norm)
        mx.eval(step(*batch))
        leaf = torch.zeros(len(gradient), requires_grad=True)
        leaf.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_([leaf], max_norm)
        np.testing.assert_allclose(before - vector(model), leaf.grad.numpy(), atol=1e-6)


def test_weight_decay_is_that_of_torchs_adamw():
    """After so many steps that its bias correction, which MLX leaves out, is none."""
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=7), rng.normal(size=(5, 7))
    optimizer = make_optimizer(arguments("--weight-decay", 0.1, "--learning-rate", 0.02))
    value = {"lora": mx.array(start)}
    leaf = torch.tensor(start, requires_grad=True)
    theirs = torch.optim.AdamW([leaf], lr=0.02, weight_decay=0.1)
    zeros = torch.zeros(7, dtype=torch.float64)
    theirs.state[leaf] = {
        "step": torch.tensor(1e6),
        "exp_avg": zeros.clone(),
        "exp_avg_sq": zeros.clone(),
    }
    for gradient in gradients:
        value = optimizer.apply_gradients({"lora": mx.array(gradient)}, value)
        leaf.grad = torch.tensor(gradient)
        theirs.step()
    np.testing.assert_allclose(value["lora"], leaf.detach().numpy(), rtol=1e-5)
    assert type(make_optimizer(arguments())) is optim.Adam


def expected_rates(schedule: str, warmup: int, n: int, rate: float) -> list[float]:
    """By MLX's functions, each from its own start."""
    after = {
        "constant": lambda step: mx.array(rate),
        "linear": optim.linear_schedule(rate, 0.0, n - warmup),
        "cosine": optim.cosine_decay(rate, n - warmup),
    }[schedule]
    rising = [rate * (i + 1) / (warmup + 1) for i in range(warmup)]
    return rising + [after(mx.array(i)).item() for i in range(n - warmup)]


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_are_those_of_mlx(schedule, warmup):
    n, rate = 20, 1e-3
    flags = "--iters", n, "--lr-schedule", schedule, "--warmup", warmup, "--learning-rate", rate
    args = arguments(*flags)
    optimizer = make_optimizer(args)
    actual = []
    for _ in range(n):
        optimizer.apply_gradients({"lora": mx.ones(1)}, {"lora": mx.ones(1)})
        actual.append(optimizer.learning_rate.item())
    np.testing.assert_allclose(
        actual, expected_rates(schedule, warmup, n, rate), rtol=1e-5, atol=1e-10
    )
    assert callable(learning_rate(args)) == (schedule != "constant" or warmup > 0)


def test_the_log_holds_the_rate_of_each_step(tiny_model, data, tmp_path):
    flags = "--iters", 10, "--warmup", 3, "--lr-schedule", "cosine", "--steps-per-report", 4
    process = train(tiny_model, data, tmp_path / "a.npz", *flags, "--val-batches", 1)
    assert process.returncode == 0, process.stderr
    expected = expected_rates("cosine", 3, 10, 1e-3)
    np.testing.assert_allclose(rates(tmp_path / "a.npz", 4), expected, rtol=1e-5)


# -------------------------------------------------------------------------------------------------
# The best, and a run that does not get there


@pytest.fixture(scope="module")
def overfitted(tiny_model, data, tmp_path_factory) -> tuple:
    """A run whose validation loss falls and then rises, which patience ends."""
    folder = shutil.copytree(data, tmp_path_factory.mktemp("overfitted") / "data")
    shutil.copy(folder / "valid.jsonl", folder / "test.jsonl")
    adapter = folder.parent / "adapters.npz"
    flags = "--iters", 400, "--steps-per-eval", 5, "--val-batches", -1, "--patience", 2
    process = train(
        tiny_model, folder, adapter, *flags, "--learning-rate", 5e-2, "--steps-per-report", 7
    )
    return process, folder, adapter


def test_patience_ends_a_run_that_no_longer_becomes_better(overfitted):
    process, _, adapter = overfitted
    assert process.returncode == 0, process.stderr
    log = entries(adapter)
    losses = {e["iteration"]: e["val_loss"] for e in log if e["val_loss"] is not None}
    best = min(losses, key=losses.get)
    assert 1 < best < 400
    assert list(losses)[-1] == best + 10  # two validations later
    assert f"Iter {best + 10}: no validation loss below that at iteration {best} in 2" in (
        process.stdout
    )
    assert max(e["iteration"] for e in log if e["loss"] is not None) == best + 10
    with np.load(adapter.with_suffix(".state.npz")) as state:
        assert state["iteration"] == best + 10


def test_the_best_adapters_are_those_of_the_lowest_validation_loss(overfitted, tiny_model):
    process, folder, adapter = overfitted
    best_file = adapter.with_name("adapters.best.npz")
    lowest = min(e["val_loss"] for e in entries(adapter) if e["val_loss"] is not None)
    tested = call_script(
        "lora.py", "--model", tiny_model, "--data", folder, "--test", "--adapter-file", best_file
    )
    assert f"Test loss {lowest:.3f}, " in tested.stdout, tested.stderr
    lines = re.findall(r"Iter (\d+): lowest validation loss so far, saved to (.*)", process.stdout)
    log = {e["iteration"]: e["val_loss"] for e in entries(adapter) if e["val_loss"] is not None}
    assert log[int(lines[-1][0])] == lowest
    assert {path for _, path in lines} == {str(best_file)}


def test_a_resumed_run_without_patience_left_trains_no_further(overfitted, tiny_model, tmp_path):
    _, folder, adapter = overfitted
    flags = "--iters", 400, "--steps-per-eval", 5, "--val-batches", -1, "--learning-rate", 5e-2
    resumed = "--resume-adapter-file", adapter, "--steps-per-report", 7
    more = tmp_path / "more.npz"
    process = train(tiny_model, folder, more, *flags, *resumed, "--patience", 2)
    assert process.returncode == 0, process.stderr
    assert more.read_bytes() == adapter.read_bytes()
    best = adapter.with_name("adapters.best.npz").read_bytes()
    assert more.with_name("more.best.npz").read_bytes() == best  # it is taken along
    assert [e["iteration"] for e in entries(more)] == [e["iteration"] for e in entries(adapter)]


def test_a_best_file_of_another_run_does_not_stay(overfitted, tiny_model, data, tmp_path):
    """Where none of this run is better than the base model."""
    _, _, adapter = overfitted
    for path in adapter.parent.glob("adapters*"):
        shutil.copy(path, tmp_path)
    flags = "--iters", 3, "--learning-rate", 1, "--steps-per-eval", 1
    process = train(tiny_model, data, tmp_path / "adapters.npz", *flags)
    assert process.returncode == 0, process.stderr
    assert "adapters.best.npz" in process.stderr  # that it is replaced
    assert not (tmp_path / "adapters.best.npz").exists()


def test_best_adapters_that_a_run_begins_with_stay_until_there_are_better_ones(
    overfitted, tiny_model, tmp_path
):
    _, folder, adapter = overfitted
    best = Path(shutil.copy(adapter.with_name("adapters.best.npz"), tmp_path))
    before = best.read_bytes()
    flags = "--steps-per-eval", 1, "--val-batches", -1, "--learning-rate", 1
    for iters, resumed in ((2, best), (3, tmp_path / "adapters.npz")):
        process = train(
            tiny_model, folder, tmp_path / "adapters.npz", "--iters", iters, *flags,
            "--resume-adapter-file", resumed,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        assert best.read_bytes() == before


def test_the_validation_before_the_first_update_is_only_the_base():
    best = Best().compare(0, 2.0, {"a": 0})
    assert (best.matrices, best.loss) == (None, 2.0)
    worse = best.compare(5, 2.5, {"a": 1}).compare(10, float("nan"), {"a": 2})
    assert (worse.matrices, worse.n_worse, worse.iteration) == (None, 2, 0)
    better = worse.compare(15, 1.5, {"a": 3})
    assert (better.matrices, better.n_worse, better.iteration) == ({"a": 3}, 0, 15)
    assert better.compare(15, 1.5, {"a": 4}) == better  # once more after a kill
    assert Best.from_array(better.to_array(), "x") == better._replace(matrices=None, digest="x")


def test_a_loss_far_above_the_start_is_one_warning(tiny_model, tmp_path):
    """A rate far too high, from weights that have learnt to repeat a word."""
    for name in ("train", "valid"):
        write_jsonl(tmp_path / f"{name}.jsonl", [" the" * n for n in range(10, 20)])
    flags = "--iters", 15, "--steps-per-report", 5, "--val-batches", 1
    learnt = train(tiny_model, tmp_path, tmp_path / "a.npz", *flags, "--learning-rate", 1e-2)
    assert learnt.stderr == ""
    resumed = "--resume-adapter-file", tmp_path / "a.best.npz", "--learning-rate", 5
    process = train(tiny_model, tmp_path, tmp_path / "b.npz", *flags, *resumed)
    assert process.returncode == 0
    _, line = process.stderr.splitlines()  # the first is of the rate
    assert re.match(
        r"lora.py: warning: iteration \d+: the (training|validation) loss is \d+\.\d+, far above "
        r"the \d+\.\d+ at the start: lower --learning-rate, or give --max-grad-norm 1",
        line,
    )


# -------------------------------------------------------------------------------------------------
# Resuming


ALL = (
    "--iters", 14, "--grad-accumulation", 2, "--warmup", 3, "--lr-schedule", "cosine",
    "--max-grad-norm", 1, "--weight-decay", 0.01, "--patience", 3, "--save-every", 3,
    "--steps-per-eval", 4, "--steps-per-report", 5, "--val-batches", 1, "--learning-rate", 1e-2,
)  # fmt: skip

# Runs lora.py, and kills it when it renames a file to a name for the N-th time.
KILLED = """
import lora, os, signal, sys
replace, n, name, last = os.replace, 0, sys.argv.pop(1), int(sys.argv.pop(1))
def kill(source, target):
    global n
    n += str(target).endswith(name)
    if n == last:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill
lora.main()
"""


def test_a_run_with_all_of_it_that_is_killed_in_its_saves_ends_as_one_never_killed(
    tiny_model, data, tmp_path
):
    def flags(adapter: Path) -> list[str]:
        resumed = ["--resume-adapter-file", adapter] if adapter.exists() else []
        paths = ["--model", tiny_model, "--data", data, "--adapter-file", adapter, *resumed]
        return [*map(str, ["--train", *paths, *ALL])]

    whole = tmp_path / "whole" / "adapters.npz"
    adapter = tmp_path / "killed" / "adapters.npz"
    whole.parent.mkdir(), adapter.parent.mkdir()
    assert call_script("lora.py", *flags(whole)).returncode == 0
    for name, n in (("state.npz", 3), ("best.npz", 2)):
        command = [sys.executable, "-c", KILLED, name, str(n), *flags(adapter)]
        killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    process = call_script("lora.py", *flags(adapter))
    assert process.returncode == 0, process.stderr
    for name in ("adapters.npz", "adapters.best.npz"):
        assert adapter.with_name(name).read_bytes() == whole.with_name(name).read_bytes()
    keys = "iteration", "loss", "val_loss", "learning_rate", "learning_rates", "tokens"
    logs = [[[e.get(key) for key in keys] for e in entries(path)] for path in (whole, adapter)]
    assert logs[0] == logs[1]
    assert sorted(os.listdir(adapter.parent)) == sorted(os.listdir(whole.parent))


def test_how_long_a_schedule_lasts_is_part_of_a_run_and_with_a_constant_rate_it_is_not(
    tiny_model, data, tmp_path
):
    adapter = tmp_path / "a.npz"
    resumed = "--resume-adapter-file", adapter, "--val-batches", 1
    train(tiny_model, data, adapter, "--iters", 4, "--lr-schedule", "linear", "--val-batches", 1)
    longer = train(tiny_model, data, adapter, "--iters", 6, "--lr-schedule", "linear", *resumed)
    assert longer.returncode == 2
    assert f"--iters is not that of the run in {tmp_path / 'a.state.npz'} (4 then)" in longer.stderr

    adapter.unlink()
    train(tiny_model, data, adapter, "--iters", 4, "--warmup", 2, "--val-batches", 1)
    other = train(tiny_model, data, adapter, "--iters", 6, "--warmup", 3, *resumed)
    assert "--warmup is not that of the run" in other.stderr
    longer = train(tiny_model, data, adapter, "--iters", 6, "--warmup", 2, *resumed)
    assert longer.returncode == 0, longer.stderr
    assert rates(adapter, 2) == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 1e-3, 1e-3])


def test_a_state_of_the_version_before_is_gone_on_from(tiny_model, data, tmp_path):
    """It tells of no such flag, of no best, and of no step's rate."""
    whole, adapter = tmp_path / "whole.npz", tmp_path / "a.npz"
    flags = "--val-batches", 1, "--steps-per-eval", 3
    train(tiny_model, data, whole, "--iters", 5, *flags)
    train(tiny_model, data, adapter, "--iters", 4, *flags)
    (tmp_path / "a.best.npz").unlink()
    state = dict(np.load(tmp_path / "a.state.npz"))
    for name in ("best", "best_files", "start_loss", "warned"):
        del state[name]
    state["done"] = state["done"][:, :4]
    run = json.loads(str(state["run"]))
    state["run"] = json.dumps({name: run[name] for name in run if name not in FORMER_VALUES})
    np.savez(tmp_path / "a.state.npz", **state)
    process = train(
        tiny_model, data, adapter, "--iters", 5, *flags, "--resume-adapter-file", adapter
    )
    assert process.returncode == 0, process.stderr
    assert adapter.read_bytes() == whole.read_bytes()
    assert (tmp_path / "a.best.npz").read_bytes() == (tmp_path / "whole.best.npz").read_bytes()


def test_a_folder_that_is_converted_again_by_a_later_version_resumes_its_runs(
    tiny_model, data, tmp_path
):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    params = json.loads((folder / "params.json").read_text())
    older = {name: value for name, value in params.items() if name != "max_position_embeddings"}
    (folder / "params.json").write_text(json.dumps(older))
    flags = folder, data, tmp_path / "a.npz", "--val-batches", 1
    assert train(*flags, "--iters", 1).returncode == 0
    (folder / "params.json").write_text(json.dumps({**params, "max_position_embeddings": 2048}))
    resumed = train(*flags, "--iters", 2, "--resume-adapter-file", tmp_path / "a.npz")
    assert "The run resumes after iteration 1" in resumed.stdout, resumed.stderr


def test_reports_without_a_finite_step_have_no_learning_rate(tiny_model, data, tmp_path):
    flags = "--iters", 4, "--val-batches", 1, "--steps-per-report", 1, "--learning-rate", 1e300
    process = train(tiny_model, data, tmp_path / "a.npz", *flags)
    assert process.returncode == 1
    assert "losses or gradients were not finite" in process.stderr
    assert entries(tmp_path / "a.npz")[-1]["learning_rate"] is None
