"""What each kind of device wants. A Mac's GPU is stood for by a CPU that takes its path, with the
lever of parts/device.py: the scripts themselves, in processes of their own.
"""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    MISTRAL_TOKENIZER,
    QUICK,
    TINY,
    launch_ranks,
    run_script,
    write_jsonl,
    write_quick_model,
)

from parts import cli, device  # before MLX, for its BLAS
from parts.adapters import read_adapter
from parts.ranks import Ranks

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

import lora
from models import Model, ModelArgs, add_lora, quantizable

# What `mx.device_info` tells on Macs with 16 GB.
MACS = {
    chip: {
        "architecture": f"applegpu_g{generation}",
        "device_name": f"Apple {chip}",
        "max_buffer_length": 9534832640,
        "max_recommended_working_set_size": 12713115648,
        "memory_size": 17179869184,
        "resource_limit": 499000,
    }
    for chip, generation in (("M1", "13g"), ("M2 Max", "14s"), ("M3", "15g"), ("M4 Pro", "16s"))
}
SMALL = ModelArgs(32, 2, 16, 48, 2, 1, 1e-5, 50)


# -------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.skipif(
    not (device.ON_CPU and Path("/sys/kernel/mm/transparent_hugepage").exists()),
    reason="a CPU with Linux that has huge pages",
)
def test_arrays_may_lie_in_huge_pages():
    array = np.array(mx.zeros(2**22), copy=False)
    address = array.ctypes.data + array.nbytes // 2
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
        elif line.startswith("VmFlags") and start <= address < end:
            assert "hg" in line.split()  # MADV_HUGEPAGE
            return
    raise AssertionError("the array is in no mapping")


# -------------------------------------------------------------------------------------------------
# Ranks


class Twins(Ranks):
    """Two ranks with the same rows; keeps what was still to be computed when they summed."""

    def __init__(self, on_gpu: bool):
        super().__init__()
        self.size, self.sum_on_gpu, self.pending = 2, on_gpu, []

    def sum(self, x: mx.array) -> mx.array:
        graph = io.StringIO()
        mx.export_to_dot(graph, x)
        self.pending.append(graph.getvalue().count("shape=rectangle"))
        return x + x


@pytest.mark.parametrize("on_gpu", [False, True], ids=["ring", "NCCL"])
def test_the_sum_of_ranks_is_waited_for_outside_of_the_step_but_for_that_of_nccl(on_gpu):
    ranks = Twins(on_gpu)
    model = Model(SMALL)
    add_lora(model, [1])
    optimizer = optim.Adam(1e-3)
    step = lora.make_step(model, optimizer, lora.loss, device.open_streams(1), ranks)
    tokens, lengths = np.arange(48).reshape(4, 12), mx.array([11] * 4)
    for _ in range(2):
        result = step(mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:]), lengths)
    mx.eval(result)
    # A compiled step calls for NCCL's sum once, when it is traced.
    assert len(ranks.pending) == (1 if on_gpu and device.TURNED else 2)
    assert all((n > 0) == on_gpu for n in ranks.pending)


# -------------------------------------------------------------------------------------------------
# Memory and dtypes


@pytest.fixture
def on_metal(monkeypatch) -> None:
    monkeypatch.setattr(device, "ON_CPU", False)
    if mx.cuda.is_available():
        pytest.skip("a GPU of NVIDIA's is none of Apple's")


@pytest.mark.usefixtures("on_metal")
@pytest.mark.parametrize("chip", MACS)
def test_a_gpu_without_bfloat16_generates_in_float16_and_trains_in_bfloat16(chip, monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: MACS[chip])
    assert device.default_dtype() == mx.bfloat16
    expected = mx.float16 if chip in ("M1", "M2 Max") else mx.bfloat16
    assert device.default_dtype(generating=True) == expected


@pytest.mark.usefixtures("on_metal")
def test_a_model_that_a_macs_gpu_does_not_hold_is_refused_and_one_that_it_holds_is_wired(
    monkeypatch,
):
    monkeypatch.setattr(mx, "device_info", lambda: MACS["M3"])
    limit = MACS["M3"]["max_recommended_working_set_size"]
    device.check_memory(limit)
    with pytest.raises(
        MemoryError, match=r"take 11\.8 GiB of memory and 11\.8 are free for the GPU"
    ):
        device.check_memory(limit + 1)
    limits = [0]  # a CPU has none, and forgets what it is told
    monkeypatch.setattr(mx, "set_wired_limit", lambda new: limits.append(new) or limits[-2])
    with device.wired():
        assert limits == [0, limit]
    assert limits == [0, limit, 0]


def test_mlx_keeps_no_more_freed_memory_than_the_longest_batch_needs(on_metal):
    """Of a CPU, MLX keeps 32 MB; of a Mac's GPU, all that there is."""
    model = Model(SMALL)
    add_lora(model, [1])
    before = mx.set_cache_limit(2**40)
    mx.set_cache_limit(before)
    with device.limits_restored():
        mx.set_cache_limit(2**40)
        mx.clear_cache()
        mx.reset_peak_memory()
        step = lora.make_step(model, optim.Adam(1e-3), lora.loss, device.open_streams(1))
        for length in (64, 128, 96, 72, 56, 120, 104):
            tokens = mx.ones((4, length), mx.int32)
            mx.eval(step(tokens, tokens, mx.array([length] * 4)))
        kept, limit = mx.get_cache_memory(), mx.set_cache_limit(0)
        assert 0 < kept <= limit <= 1.01 * (mx.get_peak_memory() - mx.get_active_memory())
    assert mx.set_cache_limit(before) == before


# -------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("message", "helps"),
    [
        (
            "[METAL] Command buffer execution failed: Impacting Interactivity "
            "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
            "turn the display off, set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1",
        ),
        (
            "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
            "(00000002:kIOGPUCommandBufferCallbackErrorTimeout)",
            "MLX_SDPA_VJP_FALLBACK=1",
        ),
        (
            "[METAL] Command buffer execution failed: Insufficient Memory "
            "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
            "a smaller --batch-size or --max-seq-length, or --grad-checkpoint",
        ),
        ("cudaMallocAsync(&data, size, stream) failed: out of memory", "--grad-checkpoint"),
        ("[malloc] Unable to allocate 1152921504606846976 bytes.", "a smaller --batch-size"),
    ],
)
def test_an_error_of_a_gpu_is_told_with_what_helps(message, helps, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lora.py"])
    with pytest.raises(SystemExit), cli.exit_statuses(device.advice):
        raise RuntimeError(message)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lora.py: error: {message}; ") and helps in line


def test_an_error_that_is_not_of_a_gpu_gets_no_advice():
    assert device.advice(OSError("No space left on device")) is None


# -------------------------------------------------------------------------------------------------
# The scripts on the path of a Mac's GPU, against themselves on that of a CPU. Texts of one length
# have each step compiled once.

METAL = {"MLX_LORA_DEVICE": "metal"}
needs_a_cpu = pytest.mark.skipif(
    mx.default_device() != mx.Device(mx.cpu) or not shutil.which("g++"),
    reason="MLX compiles for a CPU, with g++; a Mac's GPU runs these paths in all other tests",
)


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """All that lora.py does in one run, with a prompt that goes through in two pieces."""
    data = tmp_path_factory.mktemp("data")
    texts = [f"Text {i} has as many tokens as the others have." for i in range(10, 30)]
    for name, part in (("train", texts[:12]), ("valid", texts[12:16]), ("test", texts[16:])):
        write_jsonl(data / f"{name}.jsonl", part)
    return [
        "--data", str(data), "--train", "--iters", "4", "--learning-rate", "1e-2",
        "--steps-per-report", "1", "--val-batches", "1", "--test", "--prompt", "the " * 520,
        "--top-k", "40", "--top-p", "0.9", "--min-p", "0.01", "--repetition-penalty", "1.1",
        "--stop", "nothing of this kind", "-n", "6", "--adapter-file",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory) -> Path:
    mx.random.seed(7)
    model = Model(ModelArgs(**QUICK))
    nn.quantize(model, 32, 4, class_predicate=quantizable)
    folder = tmp_path_factory.mktemp("four-bits")
    return write_quick_model(folder, model, quantization={"group_size": 32, "bits": 4})


def losses(output: str) -> list[float]:
    """Of four steps, two validations, and the test."""
    values = [float(text) for text in re.findall(r"(?:Train|Val|Test) loss (\d+\.\d+)", output)]
    assert len(values) == 7, output
    return values


def run_lora(*flags: str | Path, **env: str) -> str:
    process = run_script("lora.py", *flags, **env)
    assert process.returncode == 0, process.stderr
    return process.stdout


def assert_same_adapters(ours: Path, theirs: Path) -> None:
    ours, theirs = read_adapter(ours), read_adapter(theirs)
    for name, matrix in theirs.items():
        np.testing.assert_allclose(ours[name], matrix, rtol=0, atol=1e-4, err_msg=name)


@needs_a_cpu
def test_metals_path_trains_tests_and_generates_as_a_cpu_does_alone_and_with_a_second_rank(
    tiny_model, flags, tmp_path
):
    flags = ["--model", str(tiny_model), *flags]
    expected = run_lora(*flags, tmp_path / "cpu.npz", MLX_LORA_DEVICE="")
    actual = run_lora(*flags, tmp_path / "metal.npz", **METAL)
    assert losses(actual) == pytest.approx(losses(expected), abs=1.5e-3)
    assert actual.partition("Generating")[2] == expected.partition("Generating")[2]
    assert_same_adapters(tmp_path / "metal.npz", tmp_path / "cpu.npz")

    process = launch_ranks(2, *flags, tmp_path / "ranks.npz", **METAL)
    assert losses(process.stdout) == pytest.approx(losses(expected), abs=1.5e-3)
    assert_same_adapters(tmp_path / "ranks.npz", tmp_path / "cpu.npz")


@needs_a_cpu
def test_metals_path_does_qlora_in_bfloat16_with_recomputed_layers(four_bits, flags, tmp_path):
    """The product of few rows and of many is MLX's own, inside the compiled step. Smaller steps
    than elsewhere, since the rounding of bfloat16 grows from one to the next.
    """
    *flags, adapter_flag = flags
    flags = ["--model", str(four_bits), "--grad-checkpoint", *flags]
    flags += ["--learning-rate", "3e-3", adapter_flag]
    expected = run_lora(*flags, tmp_path / "cpu.npz", MLX_LORA_DEVICE="")
    actual = run_lora(*flags, tmp_path / "metal.npz", "--dtype", "bfloat16", **METAL)
    assert "On cpu in bfloat16, 4 bits a weight" in actual
    assert losses(actual) == pytest.approx(losses(expected), rel=5e-3)


@needs_a_cpu
def test_metals_path_converts_to_the_bytes_of_a_cpu(tmp_path):
    mx.random.seed(7)
    checkpoint = tmp_path / "torch"
    checkpoint.mkdir()
    weights = {
        name: torch.from_numpy(np.array(value))
        for name, value in tree_flatten(Model(ModelArgs(**TINY)).parameters())
    }
    torch.save(weights, checkpoint / "consolidated.00.pth")
    (checkpoint / "params.json").write_text(json.dumps(TINY))
    shutil.copy(MISTRAL_TOKENIZER, checkpoint / "tokenizer.model")
    flags = "--torch-path", checkpoint, "-q", "--q-group-size", "32", "--mlx-path"
    for name, env in (("cpu", {"MLX_LORA_DEVICE": ""}), ("metal", METAL)):
        process = run_script("convert.py", *flags, tmp_path / name, **env)
        assert process.returncode == 0, process.stderr
    ours, theirs = ((tmp_path / name / "weights.npz").read_bytes() for name in ("cpu", "metal"))
    assert ours == theirs
