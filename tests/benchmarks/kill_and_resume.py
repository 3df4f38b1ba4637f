"""Kill a training at random moments, resume it each time, and compare with one never killed.

    python tests/benchmarks/kill_and_resume.py --kills 50
    python tests/benchmarks/kill_and_resume.py --kills 5 --iters 60 --options="--warmup 10
        --grad-accumulation 2 --lr-schedule cosine --max-grad-norm 1 --weight-decay 0.01
        --steps-per-eval 5 --patience 20"

The adapters, and the best ones, have to be equal byte for byte at the end. Random model of three
layers, MLX's docstrings, a save at every step.
"""

import argparse
import inspect
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from conftest import TINY, write_jsonl, write_model  # noqa: E402

from models import Model, ModelArgs  # noqa: E402

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--iters", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", default="", help="further flags of each run")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        mx.random.seed(args.seed)
        model = write_model(folder / "model", Model(ModelArgs(**TINY)))
        docs = {inspect.getdoc(getattr(nn, name)) for name in dir(nn)} - {None}
        texts = sorted(text[:200] for text in docs)
        for name in ("train", "valid"):
            write_jsonl(folder / f"{name}.jsonl", texts)

        whole = ["--iters", args.iters, *shlex.split(args.options)]

        def train(adapter: Path, seconds: float | None = None, flags: list = whole) -> bool:
            """Run, at most for so long; true if it came to its end."""
            command = [sys.executable, ROOT / "lora.py", "--model", model, "--data", folder]
            command += ["--train", "--save-every", 1, "--val-batches", 1, *flags]
            command += ["--learning-rate", 1e-3, "--adapter-file", adapter]
            if adapter.exists():
                command += ["--resume-adapter-file", adapter]
            try:
                subprocess.run(
                    [*map(str, command)], check=True, capture_output=True, timeout=seconds
                )
            except subprocess.TimeoutExpired:  # run() has sent SIGKILL
                return False
            return True

        train(folder / "whole.npz")
        start = time.perf_counter()
        train(folder / "one.npz", flags=["--iters", 1])
        startup = time.perf_counter() - start
        moments = random.Random(args.seed)
        n_killed = 0
        while n_killed < args.kills:
            if train(folder / "killed.npz", startup * moments.uniform(0.5, 2)):
                break
            n_killed += 1
        train(folder / "killed.npz")
        equal = all(
            (folder / f"killed{end}").read_bytes() == (folder / f"whole{end}").read_bytes()
            for end in (".npz", ".best.npz")
        )
        print(
            f"{n_killed} kills, {args.iters} iterations: adapters {'equal' if equal else 'DIFFER'}"
        )
        sys.exit(not equal)


if __name__ == "__main__":
    main()
