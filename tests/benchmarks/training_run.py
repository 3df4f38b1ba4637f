"""Real tokens a second of a whole training run, padding not counted, ours against mlx-lm's trainer.

    python tests/benchmarks/training_run.py --shape small --iters 40
    python tests/benchmarks/training_run.py --shape 7b --dtype bfloat16 --iters 258
    python tests/benchmarks/training_run.py --shape 7b --dtype bfloat16 --iters 500 \\
        --contenders ours "ours, packed" mlx-lm
    python tests/benchmarks/training_run.py --shape 7b --dtype bfloat16 --gpus 1 2 4

All train on the texts of --data, as the base model's tokenizer cuts them, with random weights, in
a process of their own, in turns. The time is that of the whole run: tokenizing, batches, compiling,
steps and reports. Batches are of 4 texts of at most 2,048 tokens; packed, of 4 times 2,048 tokens,
and as many epochs take fewer iterations. Needs mlx-lm. With --gpus, ours alone runs on as many GPUs
of this host, each with as large a batch.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

from distributed import run_on_gpus
from sentencepiece import SentencePieceProcessor
from training_step import ROOT, SHAPES, make_mlx_lm, make_ours

BATCH_SIZE, MAX_LENGTH = 4, 2048
ITERS_BEFORE = 2  # so that what a device compiles once and keeps on disk is not counted


def with_vocabulary_of(args: argparse.Namespace) -> tuple:
    """The shape that was asked for, with as many tokens as the tokenizer has."""
    *front, _, batch, length = SHAPES[args.shape]
    return *front, SentencePieceProcessor(model_file=args.tokenizer).vocab_size(), batch, length


def run_ours(args: argparse.Namespace, folder: Path, pack: bool = False) -> tuple[int, float]:
    """Tokens and seconds of a run of our `train`, as many epochs packed as not."""
    model = make_ours(with_vocabulary_of(args), args.dtype, 16)
    import lora
    from parts.packing import make_packing
    from parts.ranks import Ranks

    import mlx.optimizers as optim

    tokenizer = lora.Tokenizer(args.tokenizer)
    dataset = lora.Dataset(args.data)
    lengths, n_iters = dataset.encode(tokenizer).lengths, args.iters
    if pack:
        packing = make_packing(lengths, BATCH_SIZE, MAX_LENGTH)
        n_iters = round(args.iters * BATCH_SIZE / len(lengths) * packing.n_batches)

    def train(iters: int) -> None:
        flags = ["--train", "--iters", str(iters), "--val-batches", "1"]
        flags += ["--adapter-file", str(folder / "adapters.npz"), *["--pack"] * pack]
        flags += ["--batch-size", str(batch_size), "--max-seq-length", str(MAX_LENGTH)]
        options = lora.build_parser().parse_args(flags)
        optimizer = optim.Adam(1e-5)
        lora.train(model, dataset, dataset, optimizer, lora.loss, tokenizer, options, ranks)

    with Ranks.join() as ranks:
        batch_size = BATCH_SIZE * ranks.size
        train(ITERS_BEFORE)
        dataset = lora.Dataset(args.data)
        start = time.perf_counter()
        train(n_iters)
        seconds = time.perf_counter() - start
    options = {"train": True, "pack": MAX_LENGTH if pack else None}
    batches = lora.iterate_batches(dataset, tokenizer, batch_size, **options)
    return sum(int(lengths.sum()) for *_, lengths in islice(batches, n_iters)), seconds


def run_mlx_lm(args: argparse.Namespace, folder: Path) -> tuple[int, float]:
    """Tokens and seconds of a run of mlx-lm's `train`, on its own data set class and batches."""
    if args.fast_blas:
        sys.path.insert(0, str(ROOT))
        import models  # noqa: F401  loads it
    model = make_mlx_lm(with_vocabulary_of(args), args.dtype, 16)
    import mlx.optimizers as optim
    from mlx_lm.tuner.datasets import CacheDataset, TextDataset
    from mlx_lm.tuner.trainer import TrainingArgs, iterate_batches, train

    pieces = SentencePieceProcessor(model_file=args.tokenizer)
    tokenizer = SimpleNamespace(
        encode=lambda text: [pieces.bos_id(), *pieces.encode(text)], eos_token_id=pieces.eos_id()
    )
    records = [json.loads(line) for line in Path(args.data).read_text("utf-8").splitlines()]
    n_tokens = 0

    def counted(**options):
        nonlocal n_tokens
        for batch, spans in iterate_batches(**options):
            n_tokens += int((spans[:, 1] - 1).sum())
            yield batch, spans

    def run(iters: int) -> None:
        nonlocal n_tokens
        n_tokens = 0
        options = TrainingArgs(
            batch_size=BATCH_SIZE,
            max_seq_length=MAX_LENGTH,
            iters=iters,
            val_batches=1,
            steps_per_eval=10**9,
            adapter_file=folder / "adapters.safetensors",
        )
        dataset = CacheDataset(TextDataset(records, tokenizer))
        train(model, optim.Adam(1e-5), dataset, dataset, options, iterate_batches=counted)

    run(ITERS_BEFORE)
    start = time.perf_counter()
    run(args.iters)
    return n_tokens, time.perf_counter() - start


CONTENDERS = {
    "ours": run_ours,
    "ours, packed": partial(run_ours, pack=True),
    "mlx-lm": run_mlx_lm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--iters", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", default=str(ROOT / "mlx-doc-data/train.jsonl"))
    parser.add_argument("--tokenizer", default=str(ROOT / "base-model/tokenizer.model"))
    parser.add_argument("--fast-blas", action="store_true", help="give mlx-lm the BLAS we load")
    names = {"nargs": "+", "choices": CONTENDERS, "default": ["ours", "mlx-lm"]}
    parser.add_argument("--contenders", **names)
    parser.add_argument("--gpus", type=int, nargs="+", default=[], help="ours alone, on so many")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            n_tokens, seconds = CONTENDERS[args.one](args, Path(folder))
        print(json.dumps({"tokens": n_tokens, "seconds": seconds}))
        return

    # What is compared: a contender on one device, or ours on so many GPUs.
    runs = [("ours", n) for n in args.gpus] or [(name, None) for name in args.contenders]
    rates = {run: [] for run in runs}
    for _ in range(args.rounds):
        for name, n_gpus in runs:
            command = [*sys.argv, "--one", name]
            if n_gpus:
                result = run_on_gpus(n_gpus, *command)
            else:
                command = [sys.executable, *command]
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                result = json.loads(output.stdout.splitlines()[-1])
            rates[name, n_gpus].append(result["tokens"] / result["seconds"])
    print(f"{args.shape}, {args.dtype}, {args.iters} iterations, medians of {args.rounds} rounds")
    medians = {run: statistics.median(values) for run, values in rates.items()}
    which = "first" if args.gpus else "last"
    last = medians[runs[0 if args.gpus else -1]]
    print(f"| | real tokens/s | ratio to the {which} |\n|---|---|---|")
    for (name, n_gpus), rate in medians.items():
        name += f", {n_gpus} GPU(s)" if n_gpus else ""
        print(f"| {name} | {rate:,.0f} | {rate / last:.2f} |", flush=True)


if __name__ == "__main__":
    main()
