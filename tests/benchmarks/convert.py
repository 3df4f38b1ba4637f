"""Time and peak memory of convert.py on a checkpoint of Mistral 7B's shape, and on parts of it.

    python tests/benchmarks/convert.py --folder /a/disk/with/45/GB
    python tests/benchmarks/convert.py --layers 4 8

For each number of layers, a checkpoint of random bfloat16 is made. Then `cat` reads it, `cp` copies
it, and convert.py converts it without and with -q, each as a process of its own, in turns; the
medians of --rounds are printed. "quantization alone" is that of the same shapes, already in memory.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

import mistral_common

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
CHECKPOINT = "consolidated.safetensors"
MISTRAL = {
    "dim": 4096,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-5,
    "vocab_size": 32000,
}


def make_checkpoint(folder: Path, n_layers: int) -> None:
    """Write random weights in Mistral's layout, with its tokenizer."""
    import numpy as np

    from convert import parameter_shapes
    from parts.export_hugging_face import write_safetensors
    from parts.lazy_tensors import Weight

    params = {**MISTRAL, "n_layers": n_layers}
    rng = np.random.default_rng(0)
    floats = rng.uniform(-0.05, 0.05, 2**22).astype(np.float32)
    bits = (floats.view(np.uint32) >> 16).astype(np.uint16)  # of bfloat16

    def blocks(n_rows: int, *rest: int) -> Iterator[np.ndarray]:
        """Yield some of the bits, from another one on for each block."""
        at_once = max(1, 2**20 // math.prod(rest))
        for first in range(0, n_rows, at_once):
            shape = min(at_once, n_rows - first), *rest
            start = rng.integers(2**21)
            yield bits[start : start + math.prod(shape)].reshape(shape)

    weights = [
        Weight(name, shape, "bfloat16", partial(blocks, *shape))
        for name, shape in parameter_shapes({**params, "rope_theta": 1e4}).items()
    ]
    with open(folder / CHECKPOINT, "wb") as file:
        for _ in write_safetensors(file, weights):
            pass
    (folder / "params.json").write_text(json.dumps(params))
    tokenizer = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copy(tokenizer, folder / "tokenizer.model")


def quantize_alone(n_layers: int, seconds: multiprocessing.Value) -> None:
    """Quantize one layer's weights again and again, and nothing else."""
    from argparse import Namespace

    import numpy as np

    from convert import parameter_shapes, quantize

    config = {**MISTRAL, "n_layers": 1, "rope_theta": 1e4}
    weights = {
        name: np.full(shape, 0.01, np.float16)
        for name, shape in parameter_shapes(config).items()
        if name.startswith("layers.")
    }
    start = time.perf_counter()
    for _ in range(n_layers):
        quantize(weights, config, Namespace(q_group_size=64, q_bits=4))
    seconds.value = time.perf_counter() - start


def measure(*command: str | Path) -> tuple[float, float]:
    """Seconds and peak resident memory (GiB) of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_maxrss * unit / 2**30


def in_process(function, *arguments) -> None:
    """Call the function in a process of its own, so that this one stays small."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    print("| layers | | GB | s | MB/s | time to cp | peak memory, GiB |")
    print("|---|---|---|---|---|---|---|")
    for n_layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            in_process(make_checkpoint, folder, n_layers)
            checkpoint = folder / CHECKPOINT
            gigabytes = checkpoint.stat().st_size / 1e9
            script = [sys.executable, ROOT / "convert.py", "--torch-path", folder, "--mlx-path"]
            runs = {
                "cat to nowhere": ["cat", checkpoint],
                "cp": ["cp", checkpoint, folder / "written"],
                "convert.py": [*script, folder / "written"],
                "convert.py -q": [*script, folder / "written", "-q"],
            }
            results = {what: [] for what in (*runs, "quantization alone")}
            for _ in range(args.rounds):
                for what, command in runs.items():
                    os.sync()  # what was written before is not paid for by the next
                    results[what].append(measure(*command))
                    written = folder / "written"
                    shutil.rmtree(written) if written.is_dir() else written.unlink(missing_ok=True)
                alone = multiprocessing.get_context("spawn").Value("d")
                in_process(quantize_alone, n_layers, alone)
                results["quantization alone"].append((alone.value, 0))
            medians = {what: median(s for s, _ in rounds) for what, rounds in results.items()}
            for what, seconds in medians.items():
                peak = max(peak for _, peak in results[what])
                memory = f"{peak:.2f}" if peak else ""
                ratio = seconds / medians["cp"]
                print(
                    f"| {n_layers} | {what} | {gigabytes:.1f} | {seconds:.1f} "
                    f"| {gigabytes * 1e3 / seconds:.0f} | {ratio:.2f} | {memory} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
