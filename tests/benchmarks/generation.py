"""Tokens a second of generating text, ours against mlx-lm and transformers, with random weights.

    python tests/benchmarks/generation.py --shape small --bits 16 4
    python tests/benchmarks/generation.py --shape 7b --dtype float16 --bits 16 4
    python tests/benchmarks/generation.py --shape 7b --dtype float16 --bits 4 --prompt 1000 \\
        --tokens 16 --contenders ours mlx-lm
    python tests/benchmarks/generation.py --shape llama3-8b qwen2.5-7b --dtype float16 \\
        --bits 16 4 --contenders ours mlx-lm "mlx-lm, all quantized"
    python tests/benchmarks/generation.py --shape 7b --dtype float16 --bits 16 4 \\
        --first-token 64 1000 4000 --contenders ours mlx-lm

Every contender runs in a process of its own, in turns: greedy, a prompt of --prompt tokens, then
--tokens more. The second run of each process counts, since the first compiles kernels. Columns: the
time up to the first token, which is the prompt's, the peak of memory, weights included, and the
time of a token at the end to that of the 100th. "all quantized" has the embedding and the output
projection in few bits, too, as `mlx_lm.convert` makes them. With --first-token: only the time up to
the first token after prompts of these lengths, the median of some runs in a process, that of the
first run, in which kernels are compiled, and the peak of memory. Needs mlx-lm and transformers.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
from training_step import SHAPES, make_mlx_lm, make_ours, make_transformers, with_our_blas

WINDOW = 50  # tokens whose median time counts as that of one in their middle
FIRST_TOKEN_RUNS = 7  # of a process, after the first


def prepare_ours(shape: tuple, dtype: str, bits: int) -> Callable[[list[int], int], Iterator[int]]:
    model = make_ours(shape, dtype, bits, adapters=False)
    from parts import device
    from parts.decoder import generate_step

    device.open_streams(1)
    return lambda prompt, _: generate_step(model, prompt)


def prepare_mlx_lm(shape: tuple, dtype: str, bits: int, quantize_all: bool = False) -> Callable:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.generate import generate_step

    model = make_mlx_lm(shape, dtype, bits, adapters=False)
    if quantize_all:
        nn.quantize(model, 64, bits)  # those that are left
        mx.eval(model.parameters())

    def start(prompt: list[int], n: int) -> Iterator[int]:
        return (token for token, _ in generate_step(mx.array(prompt), model, max_tokens=n))

    return start


def prepare_transformers(shape: tuple, dtype: str, bits: int) -> Callable:
    """transformers' `generate`, which gives all tokens at once: they count as equally fast."""
    import torch

    model, device = make_transformers(shape, dtype)
    model.eval()

    def start(prompt: list[int], n: int) -> Iterator[int]:
        ids = torch.tensor([prompt], device=device)
        options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False}
        return iter(model.generate(ids, pad_token_id=0, **options)[0, len(prompt) :].tolist())

    return start


ALL_QUANTIZED = "mlx-lm, all quantized"
CONTENDERS = {
    "ours": prepare_ours,
    "mlx-lm": prepare_mlx_lm,
    ALL_QUANTIZED: lambda *args: prepare_mlx_lm(*args, quantize_all=True),
    "mlx-lm, our BLAS": with_our_blas(prepare_mlx_lm),
    "transformers": prepare_transformers,
}


def measure(args: argparse.Namespace) -> dict:
    """Tokens a second, the prompt included, and the time of late tokens to that of early ones."""
    start = CONTENDERS[args.one](SHAPES[args.shape[0]], args.dtype, args.bits[0])
    vocabulary = SHAPES[args.shape[0]][5]
    prompt = np.random.default_rng(0).integers(0, vocabulary, args.prompt).tolist()
    for _ in range(2):
        reset_peak_memory()
        times = [time.perf_counter()]
        for count, _token in enumerate(start(prompt, args.tokens), start=1):
            times.append(time.perf_counter())
            if count == args.tokens:
                break
    steps, growth = np.diff(times)[1:], None
    if len(steps) > 150:
        early = np.median(steps[100 - WINDOW // 2 : 100 + WINDOW // 2])
        growth = float(np.median(steps[-WINDOW:]) / early)
    return {
        "speed": args.tokens / (times[-1] - times[0]),
        "prompt": times[1] - times[0],
        "peak": peak_memory() / 1e9,
        "growth": growth,
    }


def reset_peak_memory() -> None:
    """Of whichever library this process has loaded."""
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].reset_peak_memory()
    elif sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.reset_peak_memory_stats()


def peak_memory() -> float:
    """Bytes since `reset_peak_memory`; nothing of torch on a CPU, which does not tell."""
    if "mlx.core" in sys.modules:
        return sys.modules["mlx.core"].get_peak_memory()
    cuda = sys.modules["torch"].cuda
    return cuda.max_memory_allocated() if cuda.is_available() else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["small"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--bits", type=int, nargs="+", default=[16], help="16: not quantized")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--first-token", type=int, nargs="+", metavar="PROMPT", help="lengths")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure_first_token(args) if args.first_token else measure(args)))
        return
    if args.first_token:
        first_token_table(args)
        return

    print(
        f"{args.dtype}, {args.tokens} tokens after {args.prompt}, medians of {args.rounds} rounds\n"
    )
    print(
        "| shape | bits | | tokens/s | ours to it | prompt, ms | peak, GB "
        "| a late token to an early one |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for shape in args.shape:
        for bits in args.bits:
            names = [n for n in args.contenders if n != ("transformers", ALL_QUANTIZED)[bits == 16]]
            compare(names, shape, bits, args)


def measure_first_token(args: argparse.Namespace) -> dict[str, dict]:
    """For each length of a prompt: seconds up to the first token, the median of some runs and that
    of the first one, and the peak of memory in GB.
    """
    start = CONTENDERS[args.one](SHAPES[args.shape[0]], args.dtype, args.bits[0])
    results = {}
    for length in args.first_token:
        prompt = np.random.default_rng(0).integers(0, SHAPES[args.shape[0]][5], length).tolist()
        reset_peak_memory()
        seconds = []
        for _ in range(1 + FIRST_TOKEN_RUNS):
            begin = time.perf_counter()
            tokens = start(prompt, 2)
            next(tokens)
            seconds.append(time.perf_counter() - begin)
            next(tokens)  # which some queue before they give the first: it does not count twice
        peak = peak_memory() / 1e9
        median_time = statistics.median(seconds[1:])
        results[str(length)] = {"first": seconds[0], "time": median_time, "peak": peak}
    return results


def first_token_table(args: argparse.Namespace) -> None:
    """Print a line for each contender and length of a prompt, of processes in turns."""
    print(f"{args.dtype}, medians of {args.rounds} processes in turns\n")
    print("| shape | bits | prompt | | ms | ours to it | the first run's ms | peak, GB |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in args.shape:
        for bits in args.bits:
            results = in_turns(args.contenders, shape, bits, args)
            for length in map(str, args.first_token):
                runs = {name: [r[length] for r in found] for name, found in results.items()}
                ours = median(runs["ours"], "time") if "ours" in runs else math.nan
                for name, found in runs.items():
                    seconds, first = median(found, "time"), median(found, "first")
                    print(
                        f"| {shape} | {bits} | {length} | {name} | {1000 * seconds:.1f} "
                        f"| {ours / seconds:.2f} | {1000 * first:.0f} "
                        f"| {median(found, 'peak'):.2f} |".replace("nan", ""),
                        flush=True,
                    )


def in_turns(
    names: list[str], shape: str, bits: int, args: argparse.Namespace
) -> dict[str, list[dict]]:
    """What `--rounds` processes of each contender measure."""
    results = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            command = [sys.executable, __file__, "--one", name, "--shape", shape]
            for flag in ("dtype", "prompt", "tokens"):
                command += [f"--{flag}", str(getattr(args, flag))]
            command += ["--bits", str(bits)]
            if args.first_token:
                command += ["--first-token", *map(str, args.first_token)]
            output = subprocess.run(command, capture_output=True, text=True, check=False)
            if output.returncode:
                print(f"{name} failed: {output.stderr[-500:]}", file=sys.stderr)
                continue
            results[name].append(json.loads(output.stdout.splitlines()[-1]))
    return results


def compare(names: list[str], shape: str, bits: int, args: argparse.Namespace) -> None:
    """Print a line for each contender, each measured `--rounds` times, in turns."""
    results = in_turns(names, shape, bits, args)
    ours = median(results["ours"], "speed") if "ours" in results else math.nan
    for name, runs in results.items():
        if runs:
            speed, growth = median(runs, "speed"), median(runs, "growth")
            print(
                f"| {shape} | {bits} | {name} | {speed:.1f} | {ours / speed:.2f} "
                f"| {1000 * median(runs, 'prompt'):.1f} | {median(runs, 'peak'):.2f} "
                f"| {growth:.2f} |".replace("nan", ""),
                flush=True,
            )


def median(runs: list[dict], key: str) -> float:
    """Over the runs that have it; NaN where none has."""
    values = [run[key] for run in runs if run[key] is not None]
    return statistics.median(values) if values else math.nan


if __name__ == "__main__":
    main()
