"""Time and peak memory of fuse.py on a model of Mistral 7B's shape, and on parts of it.

    python tests/benchmarks/fuse.py --folder /a/disk/with/45/GB
    python tests/benchmarks/fuse.py --layers 4 8 --formats hf gguf

For each number of layers, a folder such as convert.py's is made of random weights, and adapters of
all projections. `cp` copies the folder, and fuse.py writes it in each format, each as a process of
its own, in turns.
"""

import argparse
import json
import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
CONVERT = runpy.run_path(str(Path(__file__).with_name("convert.py")))  # the benchmark beside this
MISTRAL, measure, in_process = (CONVERT[name] for name in ("MISTRAL", "measure", "in_process"))
FORMATS = {
    "hf": [],
    "bfloat16": ["--dtype", "bfloat16"],
    "mlx": ["--format", "mlx"],
    "gguf": ["--format", "gguf"],
    "q8_0": ["--format", "gguf", "--dtype", "q8_0"],
}


def make_model(folder: Path, n_layers: int) -> None:
    """Write random weights as convert.py does, Mistral's tokenizer, and adapters of rank 8."""
    import mistral_common
    import numpy as np

    from convert import parameter_shapes
    from parts.lazy_tensors import Weight
    from parts.model_folder import write_npz

    params = {**MISTRAL, "n_layers": n_layers, "rope_theta": 1e4, "bos_id": 1, "eos_ids": [2]}
    rng = np.random.default_rng(0)
    values = rng.uniform(-0.05, 0.05, 2**20).astype(np.float16)

    def random(size: int) -> np.ndarray:
        return np.resize(np.roll(values, rng.integers(2**20)), size)

    shapes = parameter_shapes(params)
    weights = [
        Weight(name, shape, "float16", lambda s=shape: iter([random(int(np.prod(s))).reshape(s)]))
        for name, shape in shapes.items()
    ]
    for _ in write_npz(folder / "weights.npz", weights):
        pass
    (folder / "params.json").write_text(json.dumps(params))
    tokenizer = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copy(tokenizer, folder / "tokenizer.model")
    matrices = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and name.startswith("layers."):
            path, (n_rows, n_columns) = name.removesuffix(".weight"), shape
            matrices[f"{path}.lora_a"] = random(n_columns * 8).reshape(n_columns, 8)
            matrices[f"{path}.lora_b"] = random(n_rows * 8).reshape(8, n_rows)
    np.savez(folder / "adapters.npz", **matrices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    print("| layers | | GB | s | MB/s | time to cp | peak memory, GiB |")
    print("|---|---|---|---|---|---|---|")
    for n_layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder, written = Path(name) / "model", Path(name) / "written"
            folder.mkdir()
            in_process(make_model, folder, n_layers)
            weights = folder / "weights.npz"
            gigabytes = weights.stat().st_size / 1e9
            script = [sys.executable, ROOT / "fuse.py", "--model", folder, "--save-path", written]
            script += ["--adapter-file", folder / "adapters.npz"]
            runs = {"cp": ["cp", weights, written]}
            runs |= {f"fuse.py {kind}": [*script, *FORMATS[kind]] for kind in args.formats}
            copied = None
            for what, command in runs.items():
                os.sync()  # what was written before is not paid for by the next
                seconds, peak = measure(*command)
                copied = copied or seconds
                shutil.rmtree(written) if written.is_dir() else written.unlink()
                print(
                    f"| {n_layers} | {what} | {gigabytes:.1f} | {seconds:.1f} "
                    f"| {gigabytes * 1e3 / seconds:.0f} | {seconds / copied:.2f} | {peak:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
