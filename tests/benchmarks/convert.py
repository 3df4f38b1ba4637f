"""Time and peak memory of convert.py on a checkpoint of Mistral 7B's shape, and on parts of it.

    python tests/benchmarks/convert.py --folder /a/disk/with/45/GB
    python tests/benchmarks/convert.py --layers 4 8

For each number of layers, a checkpoint of random bfloat16 is made (which takes its size in memory).
Then `cat` reads it, `cp` copies it, and convert.py converts it without and with -q, each as a
process of its own, in turns. "quantization alone" is that of the same shapes, already in memory.
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
from pathlib import Path

import mistral_common

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
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
    """Write random weights in Meta's layout, with Mistral's tokenizer."""
    import torch

    from convert import parameter_shapes

    params = {**MISTRAL, "n_layers": n_layers}
    shapes = parameter_shapes({**params, "rope_theta": 1e4})
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(2**20, dtype=torch.bfloat16).uniform_(-0.05, 0.05, generator=generator)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        """Return the values, again and again, from another one on for each tensor."""
        start = int(torch.randint(len(values), (), generator=generator))
        size = math.prod(shape)
        return values.roll(start).repeat(size // len(values) + 1)[:size].clone().reshape(shape)

    tensors = {name: random(shape) for name, shape in shapes.items()}
    torch.save(tensors, folder / "consolidated.00.pth")
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
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    print("| layers | | GB | s | MB/s | time to cp | peak memory, GiB |")
    print("|---|---|---|---|---|---|---|")
    for n_layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            in_process(make_checkpoint, folder, n_layers)
            checkpoint = folder / "consolidated.00.pth"
            gigabytes = checkpoint.stat().st_size / 1e9
            script = [sys.executable, ROOT / "convert.py", "--torch-path", folder, "--mlx-path"]
            runs = {
                "cat to nowhere": ["cat", checkpoint],
                "cp": ["cp", checkpoint, folder / "written"],
                "convert.py": [*script, folder / "written"],
                "convert.py -q": [*script, folder / "written", "-q"],
            }
            results = {}
            for what, command in runs.items():
                os.sync()  # what was written before is not paid for by the next
                results[what] = measure(*command)
                written = folder / "written"
                shutil.rmtree(written) if written.is_dir() else written.unlink(missing_ok=True)
            alone = multiprocessing.get_context("spawn").Value("d")
            in_process(quantize_alone, n_layers, alone)
            results["quantization alone"] = (alone.value, None)
            for what, (seconds, peak) in results.items():
                memory = "" if peak is None else f"{peak:.2f}"
                ratio = seconds / results["cp"][0]
                print(
                    f"| {n_layers} | {what} | {gigabytes:.1f} | {seconds:.1f} "
                    f"| {gigabytes * 1e3 / seconds:.0f} | {ratio:.2f} | {memory} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
