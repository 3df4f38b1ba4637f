"""Time and memory of starting with a model: imports, reading random weights, the first token.

    python tests/benchmarks/load.py --shape small 350m
    python tests/benchmarks/load.py --shape 7b --dtype bfloat16 --folder /a/disk/with/45/GB

Ours, mlx-lm and transformers each read a checkpoint of their own format, float16 on disk, in a
process of its own, in turns; one round before those that count brings the files into the system's
cache. The memory is that of the process, on the CPU. Needs mlx-lm and transformers.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from training_step import ROOT, SHAPES

FORMATS = {"ours": "ours", "mlx-lm": "hugging-face", "transformers": "hugging-face"}


def config_of(shape: tuple) -> dict:
    """The shape as Hugging Face's config.json gives it."""
    dim, layers, heads, kv_heads, hidden, vocabulary, *_ = shape
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "intermediate_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }


def make_checkpoints(shape: tuple, folder: Path) -> None:
    """Write random weights in our format and in Hugging Face's."""
    import numpy as np
    import torch
    import transformers

    sys.path.insert(0, str(ROOT))
    from convert import parameter_shapes

    dim, layers, heads, kv_heads, hidden, vocabulary, *_ = shape
    params = {
        "dim": dim,
        "n_layers": layers,
        "head_dim": dim // heads,
        "hidden_dim": hidden,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "rope_theta": 10000.0,
    }
    ours, theirs = folder / "ours", folder / "hugging-face"
    ours.mkdir()
    (ours / "params.json").write_text(json.dumps(params))
    rng = np.random.default_rng(0)
    weights = {
        name: (rng.random(size, np.float32) * 0.04 - 0.02).astype(np.float16)
        for name, size in parameter_shapes(params).items()
    }
    np.savez(ours / "weights.npz", **weights)
    del weights
    config = config_of(shape)
    del config["model_type"], config["architectures"]
    torch.set_default_dtype(torch.float16)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(theirs)
    (theirs / "config.json").write_text(json.dumps(config_of(shape)))


def load_ours(folder: Path, dtype: str):
    sys.path.insert(0, str(ROOT))
    from models import Model, ModelArgs, quantizable
    from parts import device, model_folder
    from parts.decoder import generate_step

    import mlx.core as mx

    yield
    model = model_folder.read_config(folder / "params.json", Model, ModelArgs, quantizable)
    model_folder.load_weights(model, folder / "weights.npz", getattr(mx, dtype))
    yield
    device.open_streams(1)
    next(generate_step(model, [1]))


def load_mlx_lm(folder: Path, dtype: str):
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    yield
    model, _ = load_model(folder)
    model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())
    yield
    next(generate_step(mx.array([1]), model, max_tokens=1))


def load_transformers(folder: Path, dtype: str):
    import torch
    from transformers import LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield
    model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
    yield
    model.generate(torch.tensor([[1]], device=device), max_new_tokens=1, do_sample=False)


CONTENDERS = {"ours": load_ours, "mlx-lm": load_mlx_lm, "transformers": load_transformers}


def measure(name: str, folder: Path, dtype: str) -> dict:
    """Seconds of imports, loading and the first token, and the peak memory in bytes."""
    times = [time.perf_counter()]
    for _ in CONTENDERS[name](folder / FORMATS[name], dtype):
        times.append(time.perf_counter())
    times.append(time.perf_counter())
    imports, load, token = (
        later - earlier for earlier, later in zip(times, times[1:], strict=False)
    )
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"imports": imports, "load": load, "token": token, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["small"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, Path(args.folder), args.dtype)))
        return

    print(f"{args.dtype}, medians of {args.rounds} rounds\n")
    print("| shape | | imports, s | loading, s | first token, s | all, s | to ours | peak, GB |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in args.shape:
        results = {name: [] for name in CONTENDERS}
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            make_checkpoints(SHAPES[shape], Path(folder))
            for _ in range(args.rounds + 1):
                for name in CONTENDERS:
                    command = [sys.executable, __file__, "--one", name, "--folder", folder]
                    command += ["--dtype", args.dtype]
                    run = subprocess.run(command, capture_output=True, text=True, check=False)
                    if run.returncode:
                        sys.exit(f"{name} failed: {run.stderr[-500:]}")
                    results[name].append(json.loads(run.stdout.splitlines()[-1]))
        medians = {
            name: {key: statistics.median(run[key] for run in runs[1:]) for key in runs[0]}
            for name, runs in results.items()
        }
        ours = sum(medians["ours"][key] for key in ("imports", "load", "token"))
        for name, values in medians.items():
            parts = [values[key] for key in ("imports", "load", "token")]
            cells = [f"{part:.2f}" for part in (*parts, sum(parts), sum(parts) / ours)]
            print(
                f"| {shape} | {name} | {' | '.join(cells)} | {values['peak'] / 1e9:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
