"""What decides a run's result: a run is resumed only with the same data, model and flags."""

import argparse
import hashlib
from pathlib import Path

import numpy as np

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts.adapters import LORA_SCALE
from parts.files import digest
from parts.model_folder import checksums

DECISIVE_FLAGS = (
    "batch_size", "dtype", "grad_accumulation", "learning_rate", "lora_dropout", "lora_layers",
    "lora_projections", "lora_rank", "lora_scale", "lr_schedule", "mask_prompt", "max_grad_norm",
    "pack", "seed", "warmup", "weight_decay",
)  # fmt: skip
# Of params.json, what folders of earlier versions do not tell, so that they may be made again.
MAY_BE_UNKNOWN = ("max_position_embeddings", "bos_id", "eos_ids")
# Of the states of versions that had no such flag.
FORMER_VALUES = {
    "--grad-accumulation": 1,
    "--lora-dropout": 0,
    "--lora-projections": ["wq", "wv"],
    "--lora-rank": 8,
    "--lora-scale": LORA_SCALE,
    "--lr-schedule": "constant",
    "--mask-prompt": False,
    "--max-grad-norm": None,
    "--pack": False,
    "--warmup": 0,
    "--weight-decay": 0,
}


def run_fingerprint(rows: list[np.ndarray], params: dict, args: argparse.Namespace) -> dict:
    """Return what decides a run's result, by the name that an error gives it. A state of another
    fingerprint is not resumed from.

    rows: the token ids of the training set, as `token_rows` has them. params: of the
    model. args: with `model`, its folder.
    Raises OSError.
    """
    tokens = hashlib.sha256()
    for row in rows:
        tokens.update(len(row).to_bytes(8, "little"))
        tokens.update(row.astype(np.int64))
    flags = {f"--{name.replace('_', '-')}": getattr(args, name) for name in DECISIVE_FLAGS}
    if args.lr_schedule != "constant":  # it depends on how many updates there are
        flags["--iters"] = args.iters
    if args.pack:  # it decides which texts share a row
        flags["--max-seq-length"] = args.max_seq_length
    return {
        "the model": digest(checksums(Path(args.model) / "weights.npz")),
        "params.json": params,
        **flags,  # some of which make other data
        "the training data": tokens.hexdigest(),
    }


def check_fingerprint(saved: dict, fingerprint: dict, path: Path) -> None:
    """Raise ValueError, which names the difference, where the state in `path` is of another run."""
    told = {
        name: value
        for name, value in saved.get("params.json", {}).items()
        if value is not None or name not in MAY_BE_UNKNOWN
    }
    params = {**fingerprint["params.json"], **told}
    saved = {**FORMER_VALUES, **saved, "params.json": params}  # an older state does not tell all
    for name, value in fingerprint.items():
        if saved.get(name, value) != value:
            was = f" ({saved.get(name)} then)" if name.startswith("--") else ""
            raise ValueError(f"{name} is not that of the run in {path}{was}; {instead_of(path)}")


def instead_of(path: Path) -> str:
    """Return what to do about a state that cannot be resumed from."""
    return f"to begin a new run from the weights alone, move {path} away"
