"""Every tokenizer against a reader of its own: ids, decoded text and streams, text by text.

    python tests/benchmarks/tokenizer_ids.py
    python tests/benchmarks/tokenizer_ids.py --kinds llama3 tekken-240911 --texts 500

The texts are NumPy's docstrings, sources of CPython's library, every code point, random Unicode,
runs of white space, digits and emoji, several scripts, and special tokens written in text. Each is
encoded as text, and, where the reader can, with special tokens read. The table has the number of
texts and tokens, how many differ, and millions of characters a second. Needs llama-models,
mistral-common and transformers, and for Qwen the file that the package dashscope holds
(`pip install --no-deps dashscope`).
"""

import argparse
import importlib.util
import inspect
import json
import pkgutil
import random
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import mistral_common
import numpy
import tiktoken
import transformers
from llama_models.llama3.tokenizer import Tokenizer as MetasTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT))  # last: this folder must not hide a package

from parts.byte_level_bpe import LLAMA3_PATTERN, read_tiktoken, tokenizer_json  # noqa: E402
from parts.source_tokenizers import read_source_tokenizer  # noqa: E402
from parts.tokenizers import Tokenizer, stream_text  # noqa: E402

MISTRAL = Path(mistral_common.__file__).parent / "data"
LLAMA3 = Path(inspect.getfile(MetasTokenizer)).with_name("tokenizer.model")
PIECES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


class Pair(NamedTuple):
    """Our tokenizer and a reader of its own: its ids of a text, its ids where special tokens are
    read (None where it has no such way), and its text of ids.
    """

    ours: Tokenizer
    encode: Callable[[str], list[int]]
    encode_special: Callable[[str], list[int]] | None
    decode: Callable[[list[int]], str]


# -------------------------------------------------------------------------------------------------
# Texts


def docstrings() -> list[str]:
    """Those of NumPy's public modules."""
    found = set()
    for module in pkgutil.walk_packages(numpy.__path__, "numpy."):
        loaded = sys.modules.get(module.name)
        for value in list(vars(loaded).values()) if loaded else []:
            doc = inspect.getdoc(value)
            if doc:
                found.add(doc)
    return sorted(found)


def sources() -> list[str]:
    """The files of CPython's library, each in pieces of 4,000 characters at most."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text("utf-8") for file in files]
    return [text[i : i + 4000] for text in texts for i in range(0, len(text), 4000)]


def code_points() -> list[str]:
    """Every code point but surrogates, after letters, spaces and others of its kind."""
    texts = []
    for first in range(0, 0x110000, 64):
        points = [chr(i) for i in range(first, first + 64) if not 0xD800 <= i < 0xE000]
        texts.append("".join(f"{c} {c}a'{c}1{c}{c}\n" for c in points))
    return texts


def random_texts(count: int) -> list[str]:
    """Random Unicode, of which half are from scripts in use, with much white space and repeats."""
    rng = random.Random(0)
    ranges = [(32, 127), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x780), (0x900, 0xE80)]
    ranges += [(0x3040, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0x1F300, 0x1FA00)]
    ranges += [(0, 0xD800), (0xE000, 0x110000), (9, 14), (0x2000, 0x2070), (0x300, 0x370)]

    def text() -> str:
        pieces = []
        for _ in range(rng.randrange(12)):
            low, high = rng.choice(ranges)
            run = [chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 6))]
            pieces.append("".join(run) * rng.choice([1, 1, 1, 2, 9]))
            pieces.append(rng.choice(["", " ", "  ", "\n", "\r\n", "\t", "12345", "'S", "'ll "]))
        return "".join(pieces)

    return [text() for _ in range(count)]


WRITTEN = [
    *(
        "",
        " ",
        "\n",
        "  two before, one after ",
        "x\n\n\n   y\t\t z",
        " " * 300,
        "\n" * 70,
        "\u3000",
    ),
    *("0123456789" * 9, "1 22 333 4444 55555", "٠١٢٣٤٥٦٧٨٩", "a" * 999, "ab" * 400),
    *("你好，世界！这是一个测试。", "مرحبا بالعالم، كيف حالك؟", "नमस्ते दुनिया", "สวัสดีชาวโลก"),
    *("🙂🙃👩‍👩‍👧‍👦🏳️‍🌈", "e\u0301 é \u1112\u1161\u11ab 한", "\ufeffbom", "▁▁a▁ b", "<0x0A><0xff>"),
    *("I'LL WE'Ve they'ſ K's ß'S", "DON'T don't", "\x00\x01\x7f\x85", "\ufffd\ufffe\uffff"),
]
FRAMES = [
    "{0}",
    "a{0}",
    "{0}a",
    " {0} ",
    "{0}{0}",
    "x {0}\ny{0} z",
    "{0}\n{1}",
    "{0}{1} b",
    "<{0}>",
]


def with_special(names: list[str]) -> list[str]:
    """Texts that name special tokens, in many surroundings."""
    rng = random.Random(1)
    return [
        frame.format(rng.choice(names), rng.choice(names)) for frame in FRAMES for _ in range(24)
    ]


# -------------------------------------------------------------------------------------------------
# Pairs


def ours_of(source: Path, folder: Path, vocab_size: int = 2**31) -> Tokenizer:
    """Our tokenizer of a checkpoint's folder, as convert.py would write it."""
    config = (
        json.loads((source / "config.json").read_text())
        if (source / "config.json").is_file()
        else None
    )
    found = read_source_tokenizer(source, vocab_size, config)
    folder.mkdir()
    for name, content in found.files.items():
        content = content if isinstance(content, bytes) else content.read_bytes()
        (folder / name).write_bytes(content)
    name = "tokenizer.json" if "tokenizer.json" in found.files else "tokenizer.model"
    return Tokenizer(folder / name, found.bos_id, found.eos_ids)


def pieces(kind: str, folder: Path) -> Pair:
    """SentencePiece against mistral-common."""
    source = folder / "source"
    source.mkdir()
    shutil.copy(MISTRAL / PIECES[kind], source / "tokenizer.model")
    theirs = SentencePieceTokenizer(MISTRAL / PIECES[kind])
    ours = ours_of(source, folder / "ours")
    names = {theirs.id_to_piece(i): i for i in theirs.special_ids | {theirs.unk_id}}
    read = reading_names(names, lambda s: theirs.encode(s, False, False), 1, kind != "v1")
    return Pair(ours, lambda s: theirs.encode(s, True, False), read, theirs.decode)


def reading_names(
    names: dict[str, int], encode: Callable[[str], list[int]], bos_id: int, strips: bool
) -> Callable[[str], list[int]]:
    """Return how mistral-common writes a text out: special tokens by their ids, and what is between
    them on its own. strips: without a space next to them.
    """
    pattern = re.compile("(" + "|".join(map(re.escape, sorted(names, key=len)[::-1])) + ")")

    def read(text: str) -> list[int]:
        ids, parts = [], pattern.split(text)
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(names[part])
                continue
            if strips and i:
                part = part[1:] if part[:1] == " " else part
            if strips and i < len(parts) - 1:
                part = part[:-1] if part[-1:] == " " else part
            ids += encode(part)
        return ids if ids[:1] == [bos_id] else [bos_id, *ids]

    return read


def begun_once(encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """Return `encode` without the second beginning of a text that names its beginning itself."""

    def read(text: str) -> list[int]:
        ids = encode(text)
        return ids[1:] if ids[:1] == ids[1:2] == encode("")[:1] else ids

    return read


def tekken(kind: str, folder: Path) -> Pair:
    """Tekken against mistral-common."""
    source = folder / "source"
    source.mkdir()
    file = MISTRAL / f"tekken_{kind}.json"
    shutil.copy(file, source / "tekken.json")
    theirs = Tekkenizer.from_file(file)
    ours = ours_of(source, folder / "ours")
    names = {theirs.id_to_piece(i): i for i in range(theirs.num_special_tokens)}
    read = reading_names(names, lambda s: theirs.encode(s, False, False), 1, False)
    return Pair(ours, lambda s: theirs.encode(s, True, False), read, theirs.decode)


def llama3(folder: Path) -> Pair:
    """Llama 3's file against Meta's reader."""
    source = folder / "source"
    source.mkdir()
    shutil.copy(LLAMA3, source / "tokenizer.model")
    theirs = MetasTokenizer(LLAMA3)
    return Pair(
        ours_of(source, folder / "ours"),
        lambda s: theirs.encode(s, bos=True, eos=False),
        begun_once(lambda s: theirs.encode(s, bos=True, eos=False, allowed_special="all")),
        lambda ids: theirs.decode([i for i in ids if i < 128000]),
    )


def qwen(folder: Path) -> Pair:
    """Qwen's ranks, as Qwen 2 has them in tokenizer.json, against tiktoken."""
    package = importlib.util.find_spec("dashscope")
    file = Path(package.submodule_search_locations[0]) / "resources/qwen.tiktoken"
    tokens = read_tiktoken(file)
    special = {len(tokens) + i: name for i, name in enumerate(CHATML)}
    path = folder / "tokenizer.json"
    normalizer = {"type": "NFC"}
    path.write_bytes(tokenizer_json(tokens, 0, special, QWEN_PATTERN, None, normalizer))
    theirs = tiktoken.Encoding(
        "qwen",
        pat_str=QWEN_PATTERN,
        mergeable_ranks={token: i for i, token in enumerate(tokens)},
        special_tokens={name: i for i, name in special.items()},
    )

    def encode(s: str, **allowed) -> list[int]:
        return theirs.encode(unicodedata.normalize("NFC", s), disallowed_special=(), **allowed)

    return Pair(
        Tokenizer(path, None, [len(tokens)]),
        encode,
        lambda s: encode(s, allowed_special="all"),
        lambda ids: theirs.decode([i for i in ids if i < len(tokens)]),
    )


def hugging_face(kind: str, folder: Path) -> Pair:
    """A tokenizer.json that transformers makes and reads."""
    source, made = folder / "source", folder / "made"
    source.mkdir()
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    if kind == "llama3":
        shutil.copy(LLAMA3, source / "tokenizer.model")
        special = list(MetasTokenizer(LLAMA3).special_tokens)
        config = {"bos_token": special[0], "eos_token": special[1], "add_bos_token": True}
        config |= {"extra_special_tokens": special, "tokenizer_class": "PreTrainedTokenizerFast"}
    elif kind.startswith("tekken"):
        shutil.copy(MISTRAL / f"tekken_{kind[-6:]}.json", source / "tekken.json")
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        shutil.copy(MISTRAL / PIECES[kind[:2]], source / "tokenizer.model")
        config["legacy"] = kind.endswith("legacy")
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    kind_of = transformers.TokenizersBackend if "tekken" in kind else transformers.AutoTokenizer
    kind_of.from_pretrained(source).save_pretrained(made)
    for original in ("tekken.json", "tokenizer.model"):
        (made / original).unlink(missing_ok=True)
    (made / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    theirs = kind_of.from_pretrained(made)
    return Pair(
        ours_of(made, folder / "ours"),
        lambda s: theirs.encode(s, split_special_tokens=True),
        begun_once(theirs.encode),
        lambda ids: theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ),
    )


KINDS = {
    **{f"sentencepiece-{kind}": (pieces, kind) for kind in PIECES},
    "llama3": (llama3,),
    **{f"tekken-{kind}": (tekken, kind) for kind in ("240718", "240911")},
    "qwen": (qwen,),
    **{
        f"json-{kind}": (hugging_face, kind)
        for kind in ("v1-legacy", "v1", "v3-legacy", "v3", "v7", "llama3", "tekken-240911")
    },
}


# -------------------------------------------------------------------------------------------------
# Compare


def differences(pair: Pair, text: str) -> Iterator[str]:
    """Yield what is not the same for a text."""
    ids = pair.ours.encode(text)
    if ids != pair.encode(text):
        yield "ids"
    if pair.ours.decode(ids) != pair.decode(ids):
        yield "decoding"
    half = len(ids) // 2
    streamed = "".join(stream_text(iter(ids[half:]), pair.ours, ids[:half]))
    whole = pair.ours.decode(ids)
    if "\ufffd" not in pair.ours.decode(ids[:half])[-1:]:
        if pair.ours.decode(ids[:half]) + streamed != whole:
            yield "stream"
    elif not whole.endswith(streamed.lstrip("\ufffd")):
        yield "stream"
    if pair.encode_special is not None:
        read = pair.ours.encode(text, special_tokens=True)
        if read != pair.encode_special(text):
            yield "special"


def speed(encode: Callable[[str], list[int]], texts: list[str]) -> float:
    """Return millions of characters a second, the best of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for text in texts:
            encode(text)
        times.append(time.perf_counter() - start)
    return sum(map(len, texts)) / min(times) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--texts", type=int, default=3000, help="random texts")
    parser.add_argument("--every", type=int, default=1, help="take every n-th text")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    plain = [*docstrings(), *sources(), *code_points(), *random_texts(args.texts)]
    plain = [*WRITTEN, *plain[:: args.every]]
    timed = docstrings()[:300]
    columns = ("texts", "M chars", "ids", "decoding", "stream", "special", "Mchar/s", "theirs")
    print("| tokenizer | " + " | ".join(columns) + " |\n|" + "---|" * 9)
    for name in args.kinds:
        make, *kind = KINDS[name]
        with tempfile.TemporaryDirectory() as folder:
            pair = make(*kind, Path(folder))
            names = sorted(pair.ours.special_names)[:400]
            texts = [*plain, *with_special(names)]
            counts = dict.fromkeys(("ids", "decoding", "stream", "special"), 0)
            for text in texts:
                for what in differences(pair, text):
                    counts[what] += 1
                    if counts[what] <= 2:
                        print(f"{name}: {what}: {text[:60]!r}", file=sys.stderr)
            if pair.encode_special is None:
                counts["special"] = "-"
            size = f"{sum(map(len, texts)) / 1e6:.1f}"
            speeds = [f"{speed(e, timed):.2f}" for e in (pair.ours.encode, pair.encode)]
            row = [name, len(texts), size, *counts.values(), *speeds]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
