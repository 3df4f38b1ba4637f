"""What travels between ranks, by a formula and as measured, and the time of a step on two of them.

    python tests/benchmarks/distributed.py
    python tests/benchmarks/distributed.py --shapes tiny --skip-link
    python tests/benchmarks/distributed.py --backend nccl --ranks 1 2 4  # GPUs of this host

Prints the bytes and seconds that joining the gradients takes for the shapes of 7 B and 70 B models;
counts and times the same message between two network namespaces whose link carries 1 Gbit/s (needs
Linux, root and iproute2); and times steps of one rank with all cores against two ranks with half of
them each, in turns. On GPUs, each rank has one, and a batch as large as that of one rank alone; the
losses of steps on one batch, which the ranks split, are compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ["10.77.0.1", "10.77.0.2"]
LAYERS, RANK = 16, 8
MODELS = {  # dim, rows of wq, rows of wv, parameters of all layers and the output
    "7 B": (4096, 4096, 1024, 7.1e9),
    "70 B": (8192, 8192, 1024, 68.7e9),
}
STEP_7B = 0.0755  # seconds of a step of 4 x 512 tokens on one H100, as README.md here has it
RATES = [1, 10, 100]  # Gbit/s
NCCL_PORT = 24100
LOSS_STEPS, LOSS_RATE = 4, 1e-3  # of the steps whose losses are compared


def lora_values(dim: int, wq_rows: int, wv_rows: int) -> int:
    """Numbers that are trained: two matrices beside each of wq and wv, in each adapted layer."""
    return LAYERS * RANK * (2 * dim + wq_rows + wv_rows)


def bytes_a_step(n_values: int, n_ranks: int) -> float:
    """Bytes that each rank sends, and receives, at a step: in a ring (Patarasuk and Yuan, 2009),
    twice the share of the vector that the others have. The vector is float32, and three numbers
    longer than the gradient.
    """
    return 4 * (n_values + 3) * 2 * (n_ranks - 1) / n_ranks


def print_table() -> None:
    print(
        "| | trained | MB a step | 1 Gbit/s | 10 Gbit/s | 100 Gbit/s |\n|---|---|---|---|---|---|"
    )
    for name, (*shape, parameters) in MODELS.items():
        n_values = lora_values(*shape)
        sent = bytes_a_step(n_values, 2)
        step = STEP_7B * parameters / MODELS["7 B"][-1]
        cells = [f"{name} | {n_values / 1e6:.2f} M | {sent / 1e6:.1f}"]
        for rate in RATES:
            seconds = sent * 8 / (rate * 1e9)
            cells.append(f"{seconds * 1e3:.1f} ms, {2 * step / (step + seconds):.2f} x")
        print("|", " | ".join(cells), "|")


@contextmanager
def two_namespaces(rate: str = "1gbit") -> Iterator[tuple[str, str]]:
    """Names of two network namespaces, with the addresses `HOSTS`, and a link of that rate between.

    Raises OSError or subprocess.CalledProcessError where they cannot be made.
    """
    names = [f"ranks-{os.getpid()}-{i}" for i in range(2)]

    def ip(*command: str) -> None:
        subprocess.run(["ip", *command], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        first, second = names
        ip("-n", first, "link", "add", "veth", "type", "veth", "peer", "veth", "netns", second)
        for name, host in zip(names, HOSTS, strict=True):
            ip("-n", name, "address", "add", f"{host}/24", "dev", "veth")
            ip("-n", name, "link", "set", "veth", "up")
            limit = f"qdisc add dev veth root tbf rate {rate} burst 128kb latency 50ms".split()
            subprocess.run(["tc", "-n", name, *limit], check=True, capture_output=True)
        yield first, second
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def bytes_sent(namespace: str) -> int:
    """Bytes that have left a namespace."""
    command = ["ip", "-n", namespace, "-s", "-j", "link", "show", "dev", "veth"]
    return json.loads(subprocess.check_output(command))[0]["stats64"]["tx"]["bytes"]


def run_ranks(hosts: list[str], under: list[list[str]], *work: str) -> dict:
    """Run `work` of this file on a rank for each host; gives what rank 0 prints."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as hostfile:
        json.dump([[f"{host}:{24000 + rank}"] for rank, host in enumerate(hosts)], hostfile)
        hostfile.flush()
        processes = [
            subprocess.Popen(
                [*prefix, sys.executable, __file__, "--work", *work],
                env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": hostfile.name},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, prefix in enumerate(under)
        ]
        outputs = [process.communicate()[0] for process in processes]
    return json.loads(outputs[0])


def run_on_gpus(n_ranks: int, *command: str) -> dict:
    """Run a Python script on as many GPUs of this host, as `mlx.launch --backend nccl` does; return
    what rank 0 prints last. Raises subprocess.CalledProcessError where a rank fails.
    """
    group = {"MLX_WORLD_SIZE": n_ranks, "NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": NCCL_PORT}
    processes = []
    for rank in range(n_ranks):
        variables = {"CUDA_VISIBLE_DEVICES": rank}
        if n_ranks > 1:
            variables.update(group, MLX_RANK=rank)
        env = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        command_line = [sys.executable, *command]
        processes.append(subprocess.Popen(command_line, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    for process in processes:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    return json.loads(outputs[0].splitlines()[-1])


def message(n_values: str, n_times: str) -> dict:
    """Seconds for which a vector of that many float32 is joined with those of the other ranks."""
    from parts.ranks import Ranks

    import mlx.core as mx

    with Ranks.join() as ranks:
        vector = mx.ones(int(n_values) + 3)
        mx.eval(ranks.sum(vector))
        start = time.perf_counter()
        for _ in range(int(n_times)):
            mx.eval(ranks.sum(vector))
        return {"seconds": (time.perf_counter() - start) / int(n_times)}


def step(shape: str, n_times: str, dtype: str = "float32", n_split: str = "") -> dict:
    """Seconds of a training step on random tokens, and tokens a second of all ranks together.

    n_split: where given, each rank has a batch of its own, and the losses are those of steps on a
    batch that as many ranks would have, which the ranks there are split.
    """
    from training_step import SHAPES, make_ours

    import lora
    from parts import device
    from parts.ranks import Ranks

    import mlx.core as mx
    import mlx.optimizers as optim

    *_, vocabulary, batch, length = SHAPES[shape]

    def run(rows: int, rate: float, n_times: int) -> tuple[list[float], list[float]]:
        """Losses and seconds of steps on a batch."""
        mx.random.seed(1)
        streams = device.open_streams(rows // ranks.size, ranks.local_size)
        train_on = lora.make_step(model, optim.Adam(rate), lora.loss, streams, ranks)
        tokens = mx.random.randint(0, vocabulary, (rows, length + 1))
        inputs, targets, lengths = tokens[:, :-1], tokens[:, 1:], mx.full((rows,), length, mx.int32)
        mx.eval(inputs, targets, lengths)
        losses, seconds = [], []
        for _ in range(n_times + 1):
            start = time.perf_counter()
            losses.append(train_on(inputs, targets, lengths).loss.item())
            mx.eval(model.trainable_parameters())
            seconds.append(time.perf_counter() - start)
        return losses, seconds[1:]

    mx.random.seed(0)
    with Ranks.join() as ranks:
        model = make_ours(SHAPES[shape], dtype, 16)
        losses, rows = [], batch
        if n_split:
            losses, _ = run(batch * int(n_split), LOSS_RATE, LOSS_STEPS)
            rows *= ranks.size
        seconds = statistics.median(run(rows, 1e-5, int(n_times))[1])
        return {"seconds": seconds, "rate": rows * length / seconds, "losses": losses}


def measure_link(n_times: int = 20) -> None:
    """Compare the formula with what passes between two namespaces."""
    n_values = lora_values(*MODELS["7 B"][:3])
    with two_namespaces() as names:
        under = [["ip", "netns", "exec", name] for name in names]
        result = run_ranks(HOSTS, under, "message", str(n_values), str(n_times))
        sent = [bytes_sent(name) / (n_times + 1) for name in names]
    expected = bytes_a_step(n_values, 2)
    print(f"7 B's message between 2 ranks over 1 Gbit/s, of {n_times}:")
    for rank, measured in enumerate(sent):
        print(
            f"rank {rank} sent {measured / 1e6:.3f} MB each, by the formula {expected / 1e6:.3f}: "
            f"{measured / expected:.3f}"
        )
    ideal = expected * 8 / 1e9
    print(f"{result['seconds']:.4f} s each, by the formula {ideal:.4f}")


def measure_gpus(shape: str, n_ranks: list[int], rounds: int, steps: int) -> None:
    """Compare tokens a second and losses of different numbers of GPUs, in turns."""
    results = {n: [] for n in n_ranks}
    work = "--work", "step", shape, str(steps), "bfloat16", str(max(n_ranks))
    for _ in range(rounds):
        for n, turns in results.items():
            turns.append(run_on_gpus(n, __file__, *work))
    first = results[n_ranks[0]]
    one, expected = statistics.median(turn["rate"] for turn in first), first[0]["losses"]
    print(f"{shape}, bfloat16, medians of {rounds} rounds")
    print("| GPUs | step, s | tokens/s | to the first | largest difference of a loss |")
    print("|---|---|---|---|---|")
    for n, turns in results.items():
        rate = statistics.median(turn["rate"] for turn in turns)
        seconds = statistics.median(turn["seconds"] for turn in turns)
        losses = [zip(turn["losses"], expected, strict=True) for turn in turns]
        error = max(abs(a / b - 1) for pairs in losses for a, b in pairs)
        print(f"| {n} | {seconds:.4f} | {rate:,.0f} | {rate / one:.2f} | {error:.1e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--shapes", nargs="*", help="for the steps; tiny and small, or 7b on GPUs")
    parser.add_argument("--backend", choices=["ring", "nccl"], default="ring")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="with nccl")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=10, help="steps a turn")
    parser.add_argument("--skip-link", action="store_true", help="make no namespaces")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        sys.path.insert(0, str(ROOT))
        name, *values = args.work
        print(json.dumps({"message": message, "step": step}[name](*values)))
        return
    if args.backend == "nccl":
        for shape in args.shapes or ["7b"]:
            measure_gpus(shape, args.ranks, args.rounds, args.steps)
        return
    print_table()
    if not args.skip_link:
        measure_link()
    for shape in args.shapes or ["tiny", "small"]:
        seconds = {1: [], 2: []}
        for _ in range(args.rounds):
            for n_ranks, turns in seconds.items():
                hosts = ["127.0.0.1"] * n_ranks
                result = run_ranks(hosts, [[]] * n_ranks, "step", shape, str(args.steps))
                turns.append(result["seconds"])
        for n_ranks, turns in seconds.items():
            print(
                f"{shape}, {n_ranks} rank(s): {statistics.median(turns):.4f} s a step "
                f"({min(turns):.4f} to {max(turns):.4f})"
            )


if __name__ == "__main__":
    main()
