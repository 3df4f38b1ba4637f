"""Training that is killed, stopped, fed with nonsense, or out of disk space: nothing is lost."""

import contextlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    MISTRAL_TOKENIZER,
    ROOT,
    RUN_FILES,
    SLOWNESS,
    QUICK,
    call_script,
    small_disk,
    wait_for,
    write_jsonl,
    write_quick_model,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parts import device  # before MLX, for its BLAS
from parts.adapters import read_adapter

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten

import lora
from models import Model, ModelArgs, add_lora

TOKENIZER = lora.Tokenizer(MISTRAL_TOKENIZER)


@pytest.fixture(scope="module")
def flags(tiny_model, data) -> list[str]:
    """A run of 30 steps, of which each is saved."""
    return [
        "--model", str(tiny_model), "--data", str(data), "--train", "--iters", "30",
        "--learning-rate", "1e-3", "--save-every", "1", "--steps-per-report", "7",
        "--steps-per-eval", "12", "--val-batches", "1", "--seed", "5",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory) -> Path:
    """The adapters of that run."""
    adapter = tmp_path_factory.mktemp("uninterrupted") / "adapters.npz"
    process = call_script("lora.py", *flags, "--adapter-file", adapter)
    assert process.returncode == 0, process.stderr
    return adapter


def logged(adapter: Path) -> list[tuple]:
    """What the log beside an adapter file says of a run, but for times and memory."""
    lines = adapter.with_suffix(".log.jsonl").read_text().splitlines()
    keys = "iteration", "loss", "val_loss", "learning_rate", "tokens"
    return [tuple(json.loads(line)[key] for key in keys) for line in lines]


def start(*arguments: str | Path, cwd: Path | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, ROOT / "lora.py", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def resume(flags: list[str], adapter: Path) -> list[str]:
    """The flags to go on with, once something is saved."""
    resumed = ["--resume-adapter-file", str(adapter)] if adapter.exists() else []
    return [*flags, "--adapter-file", str(adapter), *resumed]


# -------------------------------------------------------------------------------------------------
# Kills and signals


def test_a_run_killed_at_random_moments_ends_with_adapters_and_log_of_one_never_killed(
    flags, uninterrupted, tmp_path
):
    adapter = tmp_path / "adapters.npz"
    moments = random.Random(11)
    for _ in range(5):
        process = start(*resume(flags, adapter))
        wait_for(process, "Training")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=0.3 * moments.random())
        process.kill()
        process.communicate()
    process = call_script("lora.py", *resume(flags, adapter))
    assert process.returncode == 0, process.stderr
    assert adapter.read_bytes() == uninterrupted.read_bytes()
    assert logged(adapter) == logged(uninterrupted)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "raise KeyboardInterrupt"])
@pytest.mark.parametrize("before", ["nothing", "fewer layers"])
def test_a_run_killed_with_the_state_in_its_place_and_the_adapters_not_goes_on_from_the_state(
    flags, uninterrupted, tmp_path, before, end
):
    """At its first save, over nothing or over the adapters of another run."""
    adapter = tmp_path / "adapters.npz"
    if before == "fewer layers":
        options = "--adapter-file", adapter, "--lora-layers", "1", "--iters", "1"
        assert call_script("lora.py", *flags, *options).returncode == 0
    script = (
        "import lora, os, signal\n"
        "replace = os.replace\n"
        "def kill(source, target):\n"
        "    if str(target).endswith('adapters.npz'):\n"
        f"        {end}\n"
        "    replace(source, target)\n"
        "os.replace = kill\n"
        "lora.main()\n"
    )
    command = [sys.executable, "-c", script, *flags, "--adapter-file", adapter]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode in (-signal.SIGKILL, 130), killed.stderr
    process = call_script(
        "lora.py", *flags, "--adapter-file", adapter, "--resume-adapter-file", adapter
    )
    assert process.returncode == 0, process.stderr
    assert "The run resumes after iteration 1" in process.stdout
    assert adapter.read_bytes() == uninterrupted.read_bytes()


@pytest.mark.parametrize(
    "signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_the_run_after_a_step_and_says_how_to_go_on(
    flags, uninterrupted, tmp_path, monkeypatch, signum, status
):
    process = start(*flags, "--save-every", "1000", cwd=tmp_path)
    wait_for(process, "Iter 7: Train loss")
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60 * SLOWNESS)
    assert process.returncode == status
    (line,) = errors.splitlines()
    command = shlex.split(line.partition("resume with: ")[2])
    assert (command[0], Path(command[1])) == ("python", ROOT / "lora.py")
    monkeypatch.chdir(tmp_path)
    assert call_script("lora.py", *command[2:]).returncode == 0
    assert (tmp_path / "adapters.npz").read_bytes() == uninterrupted.read_bytes()


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_first_evaluation_saves_the_first_step(
    tiny_model, data, tmp_path, docstrings, signum, status
):
    folder = tmp_path / "long"
    folder.mkdir()
    shutil.copy(data / "train.jsonl", folder)
    write_jsonl(folder / "valid.jsonl", docstrings * 200)
    adapter = tmp_path / "adapters.npz"
    process = start(
        "--model", tiny_model, "--data", folder, "--train", "--val-batches", "-1",
        "--adapter-file", adapter,
    )  # fmt: skip
    wait_for(process, "Training")
    time.sleep(1)
    process.send_signal(signum)
    output, errors = process.communicate(timeout=60 * SLOWNESS)
    assert process.returncode == status
    assert "stopped at iteration 1;" in errors
    assert "Val loss" not in output
    assert len(read_adapter(adapter)) == 12


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    """Run in a process of its own: what the first signal leaves undone, the second does."""
    script = (
        "import os, signal\n"
        "from parts.interrupts import Interrupts\n"
        "with Interrupts() as interrupts:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert interrupts.caught == [signal.SIGINT]\n"
        "    print('first', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('second')\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.stdout == "first\n"
    assert "KeyboardInterrupt" in process.stderr


# -------------------------------------------------------------------------------------------------
# The state


@pytest.fixture(scope="module")
def stopped(flags, tmp_path_factory) -> Path:
    """A folder with the adapters and the state of iteration 10, and the folder of the data."""
    folder = tmp_path_factory.mktemp("stopped")
    adapter = folder / "adapters.npz"
    process = call_script("lora.py", *flags, "--iters", "10", "--adapter-file", adapter)
    assert process.returncode == 0, process.stderr
    return folder


def test_output_that_nobody_reads_any_more_costs_no_step(
    flags, uninterrupted, tmp_path, monkeypatch
):
    """As with `| head`, or a terminal that is closed."""
    process = start(*flags, "--save-every", "1000", cwd=tmp_path)
    wait_for(process, "Iter 7: Train loss")
    process.stdout.close()
    assert process.wait(60 * SLOWNESS) == 1
    assert process.stderr.read() == ""
    monkeypatch.chdir(tmp_path)
    resumed = call_script("lora.py", *flags, "--resume-adapter-file", "adapters.npz")
    assert int(re.search(r"resumes after iteration (\d+)", resumed.stdout)[1]) > 7
    assert (tmp_path / "adapters.npz").read_bytes() == uninterrupted.read_bytes()


def test_adapters_behind_a_link_are_written_where_it_leads(flags, tmp_path):
    (tmp_path / "disk").mkdir()
    adapter, link = tmp_path / "disk" / "real.npz", tmp_path / "adapters.npz"
    link.symlink_to(adapter)
    written = []
    for seed in ("1", "2"):  # where nothing is, and where adapters are
        run = [*flags, "--iters", "2", "--seed", seed, "--adapter-file", link]
        process = call_script("lora.py", *run)
        assert process.returncode == 0, process.stderr
        assert link.is_symlink()
        assert read_adapter(adapter)
        written.append(adapter.read_bytes())
    assert written[0] != written[1]


def test_the_state_lies_beside_the_adapters(stopped):
    assert sorted(path.name for path in stopped.iterdir()) == RUN_FILES


def test_a_run_that_goes_on_goes_on_in_the_same_log(flags, stopped, uninterrupted, tmp_path):
    """A line that a kill cut off, and what the lost steps had reported, are left out."""
    folder = shutil.copytree(stopped, tmp_path / "copy")
    with open(folder / "adapters.log.jsonl", "a") as log:
        log.write('{"iteration": 14, "tokens": 1}\n7\n{"iterat')
    process = call_script("lora.py", *resume(flags, folder / "adapters.npz"))
    assert process.returncode == 0, process.stderr
    entries = logged(folder / "adapters.npz")
    # The first run ended at iteration 10, which it reported and evaluated for that.
    assert [entry[0] for entry in entries] == [1, 7, 10, 10, 12, 14, 21, 24, 28, 30, 30]
    assert entries[6:] == logged(uninterrupted)[4:]


@pytest.mark.parametrize(
    "change, says",
    [
        (["--batch-size", "3"], "--batch-size is not that of the run in "),
        (["--learning-rate", "1e-4"], "(0.001 then); to begin a new run from the weights alone"),
        (["--seed", "6"], "--seed is not that of the run"),
        (["--iters", "9"], "is of iteration 10, and this run ends at 9: --iters and"),
    ],
)
def test_a_changed_flag_is_named(flags, stopped, tmp_path, change, says):
    process = call_script(
        "lora.py", *flags, "--resume-adapter-file", stopped / "adapters.npz",
        "--adapter-file", tmp_path / "more.npz", *change,
    )  # fmt: skip
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert says in line


def test_changed_data_and_another_model_are_named(flags, stopped, data, tiny_model, tmp_path):
    other = shutil.copytree(data, tmp_path / "data")
    write_jsonl(other / "train.jsonl", ["one text", "and another"])
    resumed = [*flags, "--resume-adapter-file", stopped / "adapters.npz", "--adapter-file"]
    process = call_script("lora.py", *resumed, tmp_path / "a.npz", "--data", other)
    assert (process.returncode, "the training data is not that" in process.stderr) == (2, True)

    model = shutil.copytree(tiny_model, tmp_path / "stretched")
    params = json.loads((model / "params.json").read_text())
    (model / "params.json").write_text(json.dumps(params | {"rope_theta": 1e6}))
    process = call_script("lora.py", *resumed, tmp_path / "a.npz", "--model", model)
    assert (process.returncode, "params.json is not that" in process.stderr) == (2, True)

    mx.random.seed(8)
    model = write_quick_model(tmp_path / "model", Model(ModelArgs(**QUICK)))
    process = call_script("lora.py", *resumed, tmp_path / "a.npz", "--model", model)
    assert (process.returncode, "the model is not that" in process.stderr) == (2, True)


def test_a_state_of_other_adapters_is_not_used(flags, stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "copy")
    matrices = read_adapter(folder / "adapters.npz")
    np.savez(folder / "adapters.npz", **{name: value / 2 for name, value in matrices.items()})
    process = call_script("lora.py", *resume(flags, folder / "adapters.npz"), "--iters", "1")
    assert process.returncode == 0, process.stderr
    assert "adapters.state.npz is of other adapters" in process.stdout


def test_adapters_put_back_from_a_copy_are_gone_on_from(flags, stopped, tmp_path):
    """Not the state of what was saved since."""
    folder = shutil.copytree(stopped, tmp_path / "copy")
    adapter = folder / "adapters.npz"
    saved = adapter.read_bytes()
    process = call_script("lora.py", *resume(flags, adapter), "--iters", "11")
    assert process.returncode == 0, process.stderr
    adapter.write_bytes(saved)
    process = call_script("lora.py", *resume(flags, adapter), "--iters", "1")
    assert process.returncode == 0, process.stderr
    assert "adapters.state.npz is of other adapters" in process.stdout


def test_a_run_that_goes_on_in_another_file_takes_its_log_along(flags, stopped, tmp_path):
    other = tmp_path / "other.npz"
    shutil.copy(stopped / "adapters.log.jsonl", tmp_path / "other.log.jsonl")
    resumed = ["--resume-adapter-file", stopped / "adapters.npz", "--adapter-file", other]
    process = call_script("lora.py", *flags, *resumed, "--iters", "14")
    assert process.returncode == 0, process.stderr
    before = (stopped / "adapters.log.jsonl").read_text()
    after = (tmp_path / "other.log.jsonl").read_text()
    assert after.startswith(before) and len(after) > len(before)


def test_a_run_that_is_resumed_at_its_end_writes_the_adapters_that_were_asked_for(
    flags, stopped, tmp_path
):
    process = call_script(
        "lora.py", *flags, "--iters", "10", "--resume-adapter-file", stopped / "adapters.npz",
        "--adapter-file", tmp_path / "copy.npz",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "copy.npz").read_bytes() == (stopped / "adapters.npz").read_bytes()


def test_a_validation_that_was_broken_off_is_made_up_for(flags, stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "copy")
    adapter, log = folder / "adapters.npz", folder / "adapters.log.jsonl"
    *lines, _ = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines))
    process = call_script("lora.py", *resume(flags, adapter), "--iters", "10")
    assert process.returncode == 0, process.stderr
    assert logged(adapter) == logged(stopped / "adapters.npz")


def test_a_state_that_lacks_something_is_one_line(flags, stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "copy")
    with np.load(folder / "adapters.state.npz") as archive:
        state = {name: value for name, value in archive.items() if not name.endswith(".m")}
    np.savez(folder / "adapters.state.npz", **state)
    process = call_script("lora.py", *resume(flags, folder / "adapters.npz"))
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "adapters.state.npz is damaged" in line


def test_a_damaged_state_is_one_line(flags, stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "copy")
    state = folder / "adapters.state.npz"
    state.write_bytes(state.read_bytes()[:-50])
    process = call_script("lora.py", *resume(flags, folder / "adapters.npz"))
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "adapters.state.npz is damaged" in line


@pytest.mark.parametrize("skip", [0, 1, 5, 6, 7, 20])
def test_batches_that_are_skipped_are_those_that_came_first(data, skip):
    dset = lora.Dataset(data / "train.jsonl")

    def tokens(skip, n):
        batches = lora.iterate_batches(dset, TOKENIZER, 4, train=True, seed=2, skip=skip)
        return [inputs.tolist() for inputs, _, _ in islice(batches, n)]

    assert tokens(skip, 4) == tokens(0, skip + 4)[skip:]


# -------------------------------------------------------------------------------------------------
# Numbers that are not finite


def test_an_overflow_leaves_updates_out_and_ends_the_run_with_finite_adapters(data, tmp_path):
    """Weights that float16 holds, and whose products it does not; and a rate that would do it."""
    mx.random.seed(7)
    model = Model(ModelArgs(**QUICK))
    model.apply(lambda value: value * 300)
    folder = write_quick_model(tmp_path / "huge", model)
    adapter = tmp_path / "adapters.npz"
    process = call_script(
        "lora.py", "--model", folder, "--data", data, "--train", "--dtype", "float16",
        "--learning-rate", "1e30", "--steps-per-report", "2", "--adapter-file", adapter,
    )  # fmt: skip
    assert process.returncode == 1
    high, *warnings, error = process.stderr.splitlines()
    assert "--learning-rate 1e+30 is high" in high
    assert len(warnings) == 4
    for i, warning in enumerate(warnings, start=1):
        assert f"iteration {i}: the loss or a gradient is not finite" in warning
    assert error.startswith("lora.py: error: at iteration 4 the last 4 losses or gradients were")
    matrices = read_adapter(adapter)  # which refuses what is not finite
    assert all(not value.any() for name, value in matrices.items() if name.endswith("lora_b"))


def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments(tiny_model, data):
    model, tokenizer = lora.load_model(tiny_model)
    add_lora(model, [1, 2])
    optimizer = optim.Adam(1e-3)
    step = lora.make_step(model, optimizer, lora.loss, device.open_streams(2))
    batch = next(lora.iterate_batches(lora.Dataset(data / "train.jsonl"), tokenizer, 4))
    inputs, targets, lengths = batch
    broken = inputs, targets, mx.zeros_like(lengths)  # the mean of no losses at all

    def everything() -> list:
        values = tree_flatten([model.trainable_parameters(), optimizer.state])
        return [np.array(value).tolist() for _, value in values]

    assert step(*batch).finite.item()
    before = everything()
    assert not step(*broken).finite.item()
    assert everything() == before
    assert step(*batch).finite.item()
    assert everything() != before


# -------------------------------------------------------------------------------------------------
# Errors of the device

# Runs lora.py, whose N-th step gives a loss and matrices that MLX fails to compute, for the inverse
# of a matrix that has none. That shows only when they are waited for, as a GPU's errors do.
BREAKS = """
import lora, sys, mlx.core as mx
from mlx.utils import tree_map
sys.argv[0] = "lora.py"
make_step, n_steps = lora.make_step, 0
def make_breaking_step(model, *others):
    step = make_step(model, *others)
    def breaking_step(*batch, **options):
        global n_steps
        n_steps += 1
        result = step(*batch, **options)
        if n_steps == N:
            failing = mx.linalg.inv(mx.zeros((2, 2)), stream=mx.cpu)[0, 0]
            result = result._replace(loss=result.loss + failing)
            model.update(tree_map(lambda a: a + failing, model.trainable_parameters()))
        return result
    return breaking_step
lora.make_step = make_breaking_step
lora.main()
"""


def break_at(n: int, *flags: str | Path) -> subprocess.CompletedProcess:
    """Run lora.py with an error of the device, MLX's own, in the `n`-th step."""
    command = [sys.executable, "-c", BREAKS.replace("N:", f"{n}:"), *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_an_error_of_the_device_costs_no_more_than_the_steps_since_the_last_report(
    flags, uninterrupted, tmp_path
):
    adapter = tmp_path / "adapters.npz"
    options = *flags, "--save-every", "1000", "--adapter-file", adapter
    process = break_at(23, *options)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("lora.py: error: [Inverse")
    assert line.endswith(f"; iteration 21 is saved, resume with --resume-adapter-file {adapter}")
    process = call_script("lora.py", *options, "--resume-adapter-file", adapter)
    assert process.returncode == 0, process.stderr
    assert adapter.read_bytes() == uninterrupted.read_bytes()
    assert logged(adapter) == logged(uninterrupted)


def test_an_error_of_the_device_before_anything_is_reported_saves_nothing(flags, tmp_path):
    process = break_at(2, *flags, "--save-every", "1000", "--adapter-file", tmp_path / "a.npz")
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("lora.py: error: [Inverse") and "is saved" not in line
    assert not (tmp_path / "a.npz").exists()


# -------------------------------------------------------------------------------------------------
# Disks


def test_a_disk_that_is_full_for_a_while_costs_nothing(flags, uninterrupted, tmp_path):
    """A real file system, too small until something on it is deleted."""
    disk = tmp_path / "disk"
    with small_disk(disk, "512k"):
        (disk / "other").write_bytes(bytes(480 * 1024))
        adapter = disk / "adapters.npz"
        process = start(*flags, "--adapter-file", adapter)
        wait_for(process, "Iter 7: Train loss")
        (disk / "other").unlink()
        _, errors = process.communicate(timeout=120 * SLOWNESS)
        assert process.returncode == 0, errors
        assert "iteration 1 could not be saved" in errors
        assert "No space left on device" in errors
        assert "Traceback" not in errors
        assert adapter.read_bytes() == uninterrupted.read_bytes()
        assert sorted(os.listdir(disk)) == RUN_FILES

        (disk / "other").write_bytes(bytes(480 * 1024 - sum(map(os.path.getsize, disk.iterdir()))))
        process = start(*flags, "--adapter-file", disk / "more.npz")
        wait_for(process, "Iter 7: Train loss")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120 * SLOWNESS)
        assert process.returncode == 1
        assert errors.splitlines()[-1].startswith("lora.py: error: the adapters of the last step")


# -------------------------------------------------------------------------------------------------
# Evaluation and data


def test_long_texts_are_cut_with_one_warning(tiny_model, data, tmp_path):
    tokenizer = lora.Tokenizer(tiny_model / "tokenizer.model")
    process = call_script(
        "lora.py", "--model", tiny_model, "--data", data, "--train", "--iters", "1",
        "--max-seq-length", "20", "--adapter-file", tmp_path / "a.npz", "--batch-size", "64",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    tokens = [
        len(tokenizer.encode(text, eos=True))
        for name in ("train", "valid")
        for text in lora.Dataset(data / f"{name}.jsonl")
    ]
    n_cut = sum(n > 20 for n in tokens)
    assert process.stderr.splitlines() == [
        f"lora.py: warning: {n_cut} texts are cut to 20 tokens, see --max-seq-length",
        "lora.py: warning: a batch is 24 texts, since there are no more for training",
    ]


# -------------------------------------------------------------------------------------------------
# Nonsense. In this process, since starting 1,500 would take an hour.


def outcome(capsys, monkeypatch, *arguments) -> None:
    """Run lora.py's main; it has to succeed, or to say one line and exit with status 2, or with 1
    where the memory does not hold the model that params.json tells of.
    """
    monkeypatch.setattr(sys, "argv", ["lora.py", *map(str, arguments)])
    try:
        lora.main()
    except SystemExit as exit:
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1 and re.match(r"lora\.py: error: .", errors[0]), errors
        assert exit.code == (1 if "GiB of memory" in errors[0] else 2)
    capsys.readouterr()


many = settings(
    max_examples=500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
lines = (
    st.binary(max_size=40)
    | json_values.map(lambda value: json.dumps(value).encode())
    | json_values.map(lambda value: json.dumps({"text": value}).encode())
    | st.text(max_size=40).map(lambda text: json.dumps({"text": text}).encode()[:-1])
)


@many
@given(content=st.lists(lines, max_size=4).map(b"\n".join))
def test_no_jsonl_file_ends_in_a_traceback(tiny_model, tmp_path, capsys, monkeypatch, content):
    (tmp_path / "test.jsonl").write_bytes(content)
    outcome(
        capsys, monkeypatch, "--model", tiny_model, "--data", tmp_path, "--test", "--no-adapter"
    )


matrices = st.dictionaries(
    st.sampled_from(
        [
            f"layers.{i}.attention.{n}.lora_{ab}"
            for i in (0, 2, 3)
            for n in ("wq", "wv")
            for ab in "ab"
        ]
        + ["layers.0.attention.wk.lora_a", "weight"]
    ),
    st.sampled_from([(64, 8), (8, 64), (8, 32), (64, 4), (4, 64), (0, 0), (8,), ()]),
    max_size=8,
)


@many
@given(
    shapes=matrices,
    dtype=st.sampled_from(["float32", "float64", "int32", "U3", "bool"]),
    fill=st.sampled_from([0, 1, math.nan, math.inf]),
    damage=st.none() | st.tuples(st.integers(0, 400), st.binary(max_size=8)),
)
def test_no_adapter_file_ends_in_a_traceback(
    tiny_model, tmp_path, capsys, monkeypatch, shapes, dtype, fill, damage
):
    adapter = tmp_path / "adapters.npz"
    with np.errstate(invalid="ignore"):
        np.savez(adapter, **{name: np.full(s, fill).astype(dtype) for name, s in shapes.items()})
    if damage:
        content = bytearray(adapter.read_bytes())
        content[damage[0] : damage[0] + len(damage[1])] = damage[1]
        adapter.write_bytes(content)
    outcome(
        capsys, monkeypatch, "--model", tiny_model, "--adapter-file", adapter, "--prompt", "a",
        "--num-tokens", "1",
    )  # fmt: skip


@pytest.fixture
def model_copy(tiny_model, tmp_path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


@many
@given(
    change=st.dictionaries(
        st.sampled_from([*QUICK, "quantization", "surplus"]),
        json_values | st.integers(-1, 200) | st.just(10**12),
        max_size=3,
    ),
    missing=st.sets(st.sampled_from(list(QUICK)), max_size=1),
    cut=st.none() | st.integers(0, 200),
)
def test_no_params_json_ends_in_a_traceback(model_copy, capsys, monkeypatch, change, missing, cut):
    config = {name: value for name, value in QUICK.items() if name not in missing} | change
    (model_copy / "params.json").write_text(json.dumps(config)[:cut])
    outcome(
        capsys, monkeypatch, "--model", model_copy, "--no-adapter", "--prompt", "a",
        "--num-tokens", "1",
    )  # fmt: skip
