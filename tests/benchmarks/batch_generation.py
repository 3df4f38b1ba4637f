"""Tokens a second of answering many prompts at once, ours against mlx-lm and transformers.

    python tests/benchmarks/batch_generation.py --shape 7b --dtype float16 --prompts 64
    python tests/benchmarks/batch_generation.py --shape base --prompts 16

The prompts are questions of mlx-doc-data, the weights random. "each": every answer has --tokens
tokens; "as right": as many as the right one has, and no more than --tokens. Only these count: what
transformers makes beyond them, until the longest has ended, does not. Every contender runs in a
process of its own, in turns; the best of the runs of a process counts, but for the first, which
compiles kernels. "all at once" has mlx-lm take as many rows as there are prompts; by itself it
takes 32, eight prompts at a time. Needs mlx-lm and transformers, and mlx_doc_data, which
run-training.sh makes, with a tokenizer of base-model-mlx.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from generation import peak_memory, reset_peak_memory
from training_step import ROOT, SHAPES, make_mlx_lm, make_ours, make_transformers, with_our_blas

Answer = Callable[[list[list[int]], list[int]], int]  # prompts and lengths to a number of tokens


def prepare_ours(shape: tuple, dtype: str, bits: int) -> Answer:
    model = make_ours(shape, dtype, bits, adapters=False)
    from parts import device
    from parts.batch_generation import MAX_ROWS
    from parts.continuous_batching import generate_rows

    device.open_streams(1)

    class Row:
        def __init__(self, prompt_ids: list[int], n: int):
            self.prompt_ids, self.ids, self.n = prompt_ids, [], n

        def left(self) -> int:
            return self.n - len(self.ids)

        def add(self, token: int) -> bool:
            self.ids.append(token)
            return not self.left()

    def answer(prompts: list[list[int]], lengths: list[int]) -> int:
        rows = [Row(*pair) for pair in zip(prompts, lengths, strict=True)]
        return sum(len(row.ids) for row in generate_rows(model, rows, MAX_ROWS))

    return answer


class NoTokenizer:
    """In place of mlx-lm's: no token ends a text, and none is decoded."""

    eos_token_ids = ()

    def decode(self, ids: list[int]) -> str:
        return ""


def prepare_mlx_lm(shape: tuple, dtype: str, bits: int, all_at_once: bool = False) -> Answer:
    from mlx_lm.generate import batch_generate

    model = make_mlx_lm(shape, dtype, bits, adapters=False)

    def answer(prompts: list[list[int]], lengths: list[int]) -> int:
        options = {"max_tokens": lengths, "return_token_ids": True}
        if all_at_once:
            options.update(completion_batch_size=len(prompts), prefill_batch_size=len(prompts))
        return sum(map(len, batch_generate(model, NoTokenizer(), prompts, **options).token_ids))

    return answer


def prepare_transformers(shape: tuple, dtype: str, bits: int) -> Answer:
    """transformers' `generate`, which pads on the left and ends with the longest answer."""
    import torch

    model, device = make_transformers(shape, dtype)
    model.eval()

    def answer(prompts: list[list[int]], lengths: list[int]) -> int:
        width, n = max(map(len, prompts)), max(lengths)
        pads = [width - len(ids) for ids in prompts]
        ids = [[0] * pad + ids for pad, ids in zip(pads, prompts, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in pads]
        made = model.generate(
            torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
        )
        assert made.shape[1] == width + n
        return sum(lengths)

    return answer


CONTENDERS = {
    "ours": prepare_ours,
    "mlx-lm": prepare_mlx_lm,
    "mlx-lm, all at once": lambda *args: prepare_mlx_lm(*args, all_at_once=True),
    "mlx-lm, our BLAS": lambda *args: with_our_blas(prepare_mlx_lm)(*args, all_at_once=True),
    "transformers": prepare_transformers,
}
LENGTHS = ("each", "as right")


def read_questions(args: argparse.Namespace) -> tuple[list[list[int]], list[int]]:
    """The token ids of prompts, and the tokens of their right answers, below the vocabulary."""
    sys.path.insert(0, str(ROOT))
    from parts.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    lines = (Path(args.data) / "train.jsonl").read_text("utf-8").splitlines()
    chosen = [
        json.loads(lines[i * len(lines) // args.prompts])["text"] for i in range(args.prompts)
    ]
    vocabulary = SHAPES[args.shape][5]
    prompts, lengths = [], []
    for text in chosen:
        question, _, right = text.partition("\nA: ")
        prompts.append([i % vocabulary for i in tokenizer.encode(f"{question}\nA:")])
        lengths.append(len(tokenizer.encode(right)))
    return prompts, lengths


def measure(args: argparse.Namespace) -> dict:
    """Tokens a second of both kinds of lengths, and the peak of memory, weights included."""
    answer = CONTENDERS[args.one](SHAPES[args.shape], args.dtype, args.bits[0])
    prompts, right = read_questions(args)
    results = {}
    for name in LENGTHS:
        lengths = [args.tokens if name == "each" else min(args.tokens, n) for n in right]
        speeds = []
        for _ in range(1 + args.runs):
            reset_peak_memory()
            start = time.perf_counter()
            n = answer(prompts, lengths)
            assert n == sum(lengths)
            speeds.append(n / (time.perf_counter() - start))
        results[name] = max(speeds[1:])
    return {**results, "peak": peak_memory() / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--bits", type=int, nargs="+", default=[16], help="16: not quantized")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--runs", type=int, default=2, help="of each process, after the first")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--data", default=str(ROOT / "mlx-doc-data"))
    parser.add_argument("--tokenizer", default=str(ROOT / "base-model-mlx"))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return

    print(
        f"{args.shape}, {args.dtype}, {args.prompts} prompts, {args.tokens} tokens each, or as the "
        f"right answers; tokens/s, medians of {args.rounds} rounds"
    )
    print("| | bits | each | ours to it | as right | ours to it | peak, GB |")
    print("|---|---|---|---|---|---|---|")
    for bits in args.bits:
        compare(bits, args)


def compare(bits: int, args: argparse.Namespace) -> None:
    """Print a line for each contender, each measured `--rounds` times, in turns."""
    names = [name for name in args.contenders if bits == 16 or name != "transformers"]
    results = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            command = [sys.executable, __file__, "--one", name, "--bits", str(bits)]
            for flag in ("shape", "dtype", "prompts", "tokens", "runs", "data", "tokenizer"):
                command += [f"--{flag}", str(getattr(args, flag))]
            output = subprocess.run(command, capture_output=True, text=True, check=False)
            if output.returncode:
                print(f"{name} failed: {output.stderr[-500:]}", file=sys.stderr)
                continue
            results[name].append(json.loads(output.stdout.splitlines()[-1]))

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in results[name])

    for name in filter(results.get, names):
        cells = [f"{median(name, 'peak'):.2f}".replace("nan", "")]
        for kind in reversed(LENGTHS):
            speed = median(name, kind)
            ratio = median("ours", kind) / speed if results.get("ours") else float("nan")
            cells = [f"{speed:.0f}", f"{ratio:.2f}", *cells]
        print(f"| {name} | {bits} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
