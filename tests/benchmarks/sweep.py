"""What projections, learning rate, rank, steps and bits a weight do to the perplexity of a model.

    python tests/benchmarks/sweep.py --learning-rates 1e-4 1e-3 1e-2
    python tests/benchmarks/sweep.py --projections "wq wv" "w1 w2 w3" all --ranks 4 8 16
    python tests/benchmarks/sweep.py --models base-model-mlx base-model-mlx-4bit --layers 8 30

Trains once for each combination, `--jobs` at a time, and prints the perplexity of the whole
validation set on the way, at each of the iterations that `--every` gives, and that of the whole
test set at the end. A run that broke down has no further figures. `--options` are handed to each
run of lora.py as they are: --options="--lr-schedule cosine --warmup 10".
"""

import argparse
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = "model", "projections", "learning rate", "rank", "layers", "batch size", "steps"


def train(setting: tuple, args: argparse.Namespace) -> dict[int | str, float]:
    """The validation perplexity by iteration of one run, and under "test" that of the test set."""
    model, projections, rate, rank, layers, batch_size, iters = setting
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapters.npz"
        command = [sys.executable, ROOT / "lora.py", "--train", "--test", "--model", model]
        command += ["--lora-projections", *projections.split(), "--lora-rank", rank]
        command += ["--data", args.data, "--learning-rate", rate, "--lora-layers", layers]
        command += ["--batch-size", batch_size, "--iters", iters, "--val-batches", -1]
        command += ["--steps-per-eval", args.every, "--adapter-file", adapter, "--seed", args.seed]
        command += ["--max-seq-length", args.max_seq_length, "--save-every", iters]
        command += ["--test-batches", -1, *shlex.split(args.options)]
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if run.returncode:
            tqdm.write(f"{setting}: {run.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        if not adapter.with_suffix(".log.jsonl").exists():
            return {}
        entries = map(json.loads, adapter.with_suffix(".log.jsonl").read_text().splitlines())
        values = {e["iteration"]: math.exp(e["val_loss"]) for e in entries if e["val_loss"]}
        test = re.search(r"Test ppl (\S+)\.", run.stdout)
        return {**values, "test": float(test[1])} if test else values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=[str(ROOT / "base-model-mlx")])
    parser.add_argument("--data", default=str(ROOT / "mlx-doc-data"))
    parser.add_argument("--projections", nargs="+", default=["wq wv"])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8])
    parser.add_argument("--layers", type=int, nargs="+", default=[16])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4])
    parser.add_argument("--iters", type=int, nargs="+", default=[600])
    parser.add_argument("--max-seq-length", type=int, default=2048)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--options", default="", help="further flags of lora.py")
    args = parser.parse_args()

    settings = list(
        itertools.product(
            args.models, args.projections, args.learning_rates, args.ranks,
            args.layers, args.batch_sizes, args.iters,
        )
    )  # fmt: skip
    longest = max(args.iters)
    shown = sorted({*range(args.every, longest + 1, args.every), *args.iters}) + ["test"]
    print(f"| {' | '.join((*COLUMNS, *map(str, shown)))} |")
    print("|---" * (len(COLUMNS) + len(shown)) + "|")
    with ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(lambda setting: train(setting, args), settings)
        for setting, values in zip(settings, tqdm(results, total=len(settings)), strict=True):
            model, *rest = setting
            cells = [Path(model).name, *map(str, rest)]
            cells += [f"{values[i]:.2f}" if i in values else "" for i in shown]
            tqdm.write(f"| {' | '.join(cells)} |", file=sys.stdout)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
