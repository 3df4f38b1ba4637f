"""Training on several ranks: the result of one process, and no rank that waits for a lost one.

The ranks are started as `mlx.launch` starts them, but by hand, so that each has its own status.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, RUN_FILES, SLOWNESS, launch_ranks, wait_for, write_jsonl

from parts.adapters import read_adapter
from parts.ranks import PROBES, RENDEZVOUS_TIMEOUT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
from distributed import HOSTS, bytes_a_step, bytes_sent, two_namespaces


# lora.py with less patience.
IMPATIENT = """
import sys
sys.argv[0] = "lora.py"
import lora
from parts import ranks
ranks.RENDEZVOUS_TIMEOUT, ranks.PROBES = 8, (1, 1, 3)
lora.main()
"""


@pytest.fixture(scope="module")
def flags(tiny_model, data) -> list[str]:
    """A run of 30 steps. The validation set's last batch has rows for three ranks of four."""
    return [
        "--model", str(tiny_model), "--data", str(data), "--train", "--test", "--iters", "30",
        "--learning-rate", "1e-3", "--save-every", "5", "--steps-per-report", "1",
        "--steps-per-eval", "15", "--val-batches", "-1", "--seed", "5", "--lora-projections", "all",
        "--lora-dropout", "0.1",
    ]  # fmt: skip


def start_ranks(
    n: int,
    folder: Path,
    *flags: str,
    hosts: list[str] | None = None,
    of_rank: Callable[[int], list[str]] = lambda rank: [],
    under: Callable[[int], list[str]] = lambda rank: [],
    script: tuple = (ROOT / "lora.py",),
) -> list[subprocess.Popen]:
    """Start `n` ranks in `folder`; `of_rank` gives flags and `under` a command before Python."""
    port = random.randrange(20000, 32000, 10)
    nodes = [[f"{(hosts or ['127.0.0.1'] * n)[rank]}:{port + rank}"] for rank in range(n)]
    hostfile = folder / "hosts.json"
    hostfile.write_text(json.dumps(nodes))
    return [
        subprocess.Popen(
            [*under(rank), sys.executable, *script, *flags, *of_rank(rank)],
            cwd=folder,
            env={
                **os.environ,
                "MLX_RANK": str(rank),
                "MLX_HOSTFILE": str(hostfile),
                "PYTHONPATH": str(ROOT),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]


def end(
    ranks: list[subprocess.Popen], seconds: float = 120 * SLOWNESS
) -> tuple[list[int], str, list[str]]:
    """Wait for all; gives their statuses, rank 0's output, and each one's errors.

    Of the errors, what MLX's own ring says, at times on the same line, is left out.
    """
    deadline = time.monotonic() + seconds
    try:
        outputs = [r.communicate(timeout=max(deadline - time.monotonic(), 0.1)) for r in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(output for output, _ in outputs[1:])
    assert "Traceback" not in "".join(errors for _, errors in outputs)
    errors = ["".join(re.findall(r"lora\.py: .*\n", errors)) for _, errors in outputs]
    return [rank.returncode for rank in ranks], outputs[0][0], errors


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "adapters.log.jsonl").read_text().splitlines()]


def assert_same_log(folder: Path, expected: Path) -> None:
    for entry, other in zip(read_log(folder), read_log(expected), strict=True):
        assert entry["iteration"] == other["iteration"]
        assert entry["tokens"] == other["tokens"]
        if other["loss"]:
            assert entry["loss"] == pytest.approx(other["loss"], rel=1e-5)
        else:
            assert entry["val_loss"] == pytest.approx(other["val_loss"], rel=1e-6)


def assert_same_adapters(folder: Path, expected: Path) -> None:
    ours, theirs = (read_adapter(f / "adapters.npz") for f in (folder, expected))
    assert ours.keys() == theirs.keys()
    for name, matrix in theirs.items():
        np.testing.assert_allclose(ours[name], matrix, rtol=0, atol=1e-4, err_msg=name)
    assert max(np.abs(matrix).max() for matrix in theirs.values()) > 0.1


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of one process that was never interrupted."""
    folder = tmp_path_factory.mktemp("alone")
    process = subprocess.run(
        [sys.executable, ROOT / "lora.py", *flags], cwd=folder, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


def perplexity_of(output: str) -> float:
    return float(re.search(r"Test ppl (\S+)\.$", output, re.M)[1])


# -------------------------------------------------------------------------------------------------
# The same result


def test_ranks_train_as_one_process_does(flags, alone, tmp_path):
    """What four compute is below."""
    folder, output = alone
    process = launch_ranks(2, *flags, cwd=tmp_path)
    assert process.stderr == ""
    ours = process.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == RUN_FILES
    assert math.log(perplexity_of(ours)) == pytest.approx(math.log(perplexity_of(output)), rel=1e-6)
    assert len(ours.splitlines()) == len(output.splitlines())

    assert_same_log(tmp_path, folder)
    assert_same_adapters(tmp_path, folder)


def test_a_rank_without_rows_takes_part(flags, data, tmp_path):
    """One text for two ranks, in training as in evaluation."""
    small = shutil.copytree(data, tmp_path / "data")
    for name in ("train", "valid", "test"):
        write_jsonl(small / f"{name}.jsonl", ["a text of its own"])
    few = [*flags, "--data", str(small), "--batch-size", "2", "--iters", "3", "--adapter-file"]
    statuses, output, errors = end(start_ranks(2, tmp_path, *few, "adapters.npz"))
    assert statuses == [0, 0]
    (tmp_path / "one").mkdir()
    _, expected, _ = end(start_ranks(1, tmp_path, *few, "one/adapters.npz"))
    losses = [re.findall(r"oss (\d\S+)", text.replace(",", "")) for text in (output, expected)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    assert "warning: a batch is 1 texts" in errors[0] and errors[1] == ""


@pytest.fixture
def namespaces():
    """Two network namespaces, with a link of 1 Gbit/s between them."""
    try:
        with two_namespaces("1gbit") as names:
            yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces need Linux, root and iproute2: {error}")


def in_namespaces(names: tuple[str, str]) -> dict:
    return {"hosts": HOSTS, "under": lambda rank: ["ip", "netns", "exec", names[rank]]}


def test_two_hosts_train_as_one_process_does_and_send_what_the_formula_says(
    flags, alone, tmp_path, namespaces
):
    ranks = start_ranks(2, tmp_path, *flags, **in_namespaces(namespaces))

    def count(line: str) -> np.ndarray:
        """The steps that are done at some time after that line, and the bytes that are sent."""
        wait_for(ranks[0], line)
        for rank in ranks:
            rank.send_signal(signal.SIGSTOP)
        counts = read_log(tmp_path)[-1]["iteration"], bytes_sent(namespaces[1])
        for rank in ranks:
            rank.send_signal(signal.SIGCONT)
        return np.array(counts)

    before, after = count("Iter 5: Train loss"), count("Iter 27: Train loss")
    n_steps, sent = after - before
    statuses, _, errors = end(ranks)
    assert statuses == [0, 0], errors
    assert_same_adapters(tmp_path, alone[0])
    n_values = sum(matrix.size for matrix in read_adapter(tmp_path / "adapters.npz").values())
    # Each packet has a header, each fifth step tells of its save, and a step may be under way.
    assert 0.95 < sent / n_steps / bytes_a_step(n_values, 2) < 1.15


# -------------------------------------------------------------------------------------------------
# Ranks that end


def assert_lost(ranks: list[subprocess.Popen], victim: int) -> None:
    """All but the victim end in time, with its name."""
    start = time.monotonic()
    statuses, _, errors = end(ranks, 30)
    assert time.monotonic() - start < 30
    assert statuses == [-9 if rank == victim else 1 for rank in range(len(ranks))]
    told = [text for text in errors if text]
    assert len(told) == (1 if victim else len(ranks) - 1), errors
    for text in told:
        assert text.startswith(f"lora.py: error: rank {victim} has ended or cannot be reached")


@pytest.mark.parametrize(
    "when, n, victim, n_later",
    [
        ("Iter 12: Train loss", 2, 1, 1),
        ("Iter 18: Train loss", 1, 0, 4),
        ("Iter 15: Train loss", 2, 0, 1),
    ],
)
def test_a_run_of_killed_ranks_goes_on_with_another_number_of_them(
    flags, alone, tmp_path, when, n, victim, n_later
):
    """Behind step 15 comes an evaluation, which the last kill falls into."""
    ranks = start_ranks(n, tmp_path, *flags)
    wait_for(ranks[0], when)
    ranks[victim].kill()
    assert_lost(ranks, victim)
    assert victim == 0 or not list(tmp_path.glob("*.partial"))
    resumed = [*flags, "--resume-adapter-file", "adapters.npz"]
    statuses, output, errors = end(start_ranks(n_later, tmp_path, *resumed))
    assert statuses == [0] * n_later, errors
    assert "The run resumes after iteration" in output
    folder, expected = alone
    assert math.log(perplexity_of(output)) == pytest.approx(
        math.log(perplexity_of(expected)), rel=1e-6
    )
    assert_same_log(tmp_path, folder)
    assert_same_adapters(tmp_path, folder)


def test_a_rank_killed_before_the_first_step_leaves_nothing(flags, tmp_path):
    ranks = start_ranks(2, tmp_path, *flags)
    wait_for(ranks[0], "Loading pretrained model")
    ranks[1].kill()
    assert_lost(ranks, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["hosts.json"]


def test_a_rank_that_never_comes_is_named(flags, tmp_path):
    ranks = start_ranks(3, tmp_path, *flags, script=("-c", IMPATIENT))
    ranks[2].kill()
    assert_lost(ranks, 2)
    assert RENDEZVOUS_TIMEOUT <= 20


def test_a_signal_to_one_rank_stops_all_at_the_same_step(flags, alone, tmp_path):
    ranks = start_ranks(2, tmp_path, *flags)
    wait_for(ranks[0], "Iter 10: Train loss")
    ranks[1].send_signal(signal.SIGINT)
    statuses, _, errors = end(ranks)
    assert statuses == [143, 130]
    assert re.match(r"lora\.py: stopped at iteration \d+; resume with: ", errors[0])
    assert errors[1] == ""
    with np.load(tmp_path / "adapters.state.npz") as state:
        assert f"iteration {state['iteration']};" in errors[0]


def test_a_host_that_cannot_be_reached_any_more_ends_both(flags, tmp_path, namespaces):
    """A cable that is pulled: no connection is closed, and nothing comes."""
    flags = [*flags, "--iters", "100000"]
    patience = {"script": ("-c", IMPATIENT)}
    ranks = start_ranks(2, tmp_path, *flags, **in_namespaces(namespaces), **patience)
    wait_for(ranks[0], "Iter 10: Train loss")
    command = ["ip", "-n", namespaces[0], "link", "set", "veth", "down"]
    subprocess.run(command, check=True)
    statuses, _, errors = end(ranks, 30)
    assert statuses == [1, 1]
    for text, other in zip(errors, (1, 0), strict=True):
        assert text.startswith(f"lora.py: error: rank {other} has ended or cannot be reached")
    idle, interval, n_lost = PROBES
    assert idle + interval * n_lost <= 20


# -------------------------------------------------------------------------------------------------
# Ranks that do not belong together


@pytest.mark.parametrize(
    "what", ["the data", "the model", "--learning-rate", "--resume-adapter-file", "a file"]
)
def test_ranks_that_differ_are_told_at_the_start(flags, data, tiny_model, tmp_path, what):
    other = shutil.copytree(data, tmp_path / "data")
    write_jsonl(other / "valid.jsonl", ["another text"])
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "params.json").read_text())
    (model / "params.json").write_text(json.dumps(config | {"norm_eps": 1e-4}))
    change = {
        "the data": ["--data", str(other)],
        "the model": ["--model", str(model)],
        "--learning-rate": ["--learning-rate", "1e-4"],
        "--resume-adapter-file": ["--resume-adapter-file", "adapters.npz"],
        "a file": ["--data", str(tmp_path)],
    }[what]
    ranks = start_ranks(2, tmp_path, *flags, of_rank=lambda rank: change if rank else [])
    statuses, _, errors = end(ranks, 30)
    assert statuses == [2, 2]
    says = "rank 1: " if what == "a file" else f"{what} of rank 1 is not that of rank 0"
    assert errors[0].startswith(f"lora.py: error: {says}")
    assert errors[1] == ""


def test_a_batch_that_ranks_cannot_share_is_an_error(flags, tmp_path):
    statuses, output, errors = end(start_ranks(2, tmp_path, *flags, "--batch-size", "3"), 30)
    assert (statuses, output) == ([2, 2], "")
    assert errors == [
        "lora.py: error: --batch-size 3 is the batch of all 2 ranks: give a multiple\n", ""
    ]  # fmt: skip
