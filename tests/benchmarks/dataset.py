"""Time of reading packages, each alone and all together with one process and with several.

    python tests/benchmarks/dataset.py numpy sympy torch ...

Prints records, skipped modules and seconds of each package, and of all, in turns.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [
    "mlx",
    "numpy",
    "torch",
    "sympy",
    "transformers",
    "sentencepiece",
    "hypothesis",
    "pytest",
    "peft",
    "pygments",
]


def run(packages: list[str], processes: int) -> tuple[float, int, int]:
    """Seconds, records and skipped modules of a run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "cwk_create_dataset.py"), *packages]
        command += ["--processes", str(processes), "--data-folder", folder]
        start = time.perf_counter()
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds = time.perf_counter() - start
        records = sum(len(path.read_text().splitlines()) for path in Path(folder).iterdir())
    return seconds, records, output.count("skipped ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="*", default=PACKAGES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()

    print("| package | records | modules skipped | s |\n|---|---|---|---|")
    for package in args.packages:
        seconds, records, skipped = run([package], 1)
        print(f"| {package} | {records} | {skipped} | {seconds:.1f} |", flush=True)
    times = {1: [], args.processes: []}
    for _ in range(args.rounds):
        for processes, seconds in times.items():
            seconds.append(run(args.packages, processes)[0])
    one, several = (statistics.median(seconds) for seconds in times.values())
    print(
        f"all {len(args.packages)}: {one:.1f} s with one process, {several:.1f} with "
        f"{args.processes}: {several / one:.2f} of the time"
    )


if __name__ == "__main__":
    main()
