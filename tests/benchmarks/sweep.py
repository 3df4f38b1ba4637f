"""What learning rate, layers, batch size and bits a weight do to the perplexity of the validation.

    python tests/benchmarks/sweep.py --models base-model-mlx --learning-rates 1e-4 1e-3 1e-2
    python tests/benchmarks/sweep.py --models base-model-mlx base-model-mlx-4bit --layers 8 30

Trains once for each combination, `--jobs` at a time, and prints the perplexity of the whole
validation set on the way, at each of the iterations that `--every` gives. A run that broke down has
no further figures.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]


def train(setting: tuple, args: argparse.Namespace) -> dict[int, float]:
    """The validation perplexity by iteration of one run."""
    model, rate, layers, batch_size = setting
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapters.npz"
        command = [sys.executable, ROOT / "lora.py", "--train", "--model", model]
        command += ["--data", args.data, "--learning-rate", rate, "--lora-layers", layers]
        command += ["--batch-size", batch_size, "--iters", args.iters, "--val-batches", -1]
        command += ["--steps-per-eval", args.every, "--adapter-file", adapter, "--seed", args.seed]
        command += ["--save-every", args.iters]
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if run.returncode:
            tqdm.write(f"{setting}: {run.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        if not adapter.with_suffix(".log.jsonl").exists():
            return {}
        entries = map(json.loads, adapter.with_suffix(".log.jsonl").read_text().splitlines())
        return {e["iteration"]: math.exp(e["val_loss"]) for e in entries if e["val_loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=[str(ROOT / "base-model-mlx")])
    parser.add_argument("--data", default=str(ROOT / "mlx-doc-data"))
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--layers", type=int, nargs="+", default=[16])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4])
    parser.add_argument("--iters", type=int, default=600)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()

    settings = list(
        itertools.product(args.models, args.learning_rates, args.layers, args.batch_sizes)
    )
    iterations = sorted({*range(args.every, args.iters + 1, args.every), args.iters})
    columns = "".join(f" {iteration} |" for iteration in iterations)
    print(f"| model | learning rate | layers | batch size |{columns}")
    print("|---" * (4 + len(iterations)) + "|")
    with ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(lambda setting: train(setting, args), settings)
        for setting, values in zip(settings, tqdm(results, total=len(settings)), strict=True):
            model, *rest = setting
            cells = [Path(model).name, *map(str, rest)]
            cells += [f"{values[i]:.2f}" if i in values else "" for i in iterations]
            tqdm.write(f"| {' | '.join(cells)} |", file=sys.stdout)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
