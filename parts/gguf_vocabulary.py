"""A model's tokenizer as GGUF has it, for llama.cpp.

tokenizer.model                   "llama": pieces, scores and types
tokenizer.json with byte fallback  "llama", as above; scores are made of the merges' order
tokenizer.json of bytes            "gpt2": tokens, types and merges, and the name under which
                                  llama.cpp knows how the text is first split into words
"""

from pathlib import Path
from typing import NamedTuple

from parts.cli import warn
from parts.files import read_json
from parts.source_tokenizers import token_ids
from parts.tokenizer_export import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_vocabulary,
)
from parts.tokenizers import tokenizer_file

# How a text is split into words: the pattern of each step, as in tokenizer.json.
GPT2 = "ByteLevel"  # GPT-2's own pattern, which that step has built in
DIGITS = "Digits"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {  # llama.cpp's names
    (rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}{{1,3}}|{REST}",): "llama-bpe",
    (rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}|{REST}",): "qwen2",
    (TEKKEN,): "tekken",
    (DIGITS, GPT2): "smollm",
    (GPT2,): "gpt-2",
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGITS): "deepseek-coder",
}


class GGUFVocabulary(NamedTuple):
    """What GGUF says of a tokenizer. scores: of SentencePiece's kind; merges: of bytes'; pre: the
    name of how words are split; unknown: an id; space_prefix: whether a text gets a space before
    it; extra_spaces: whether runs of spaces are one.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    unknown: int | None = None
    space_prefix: bool = False
    extra_spaces: bool = False


def read_gguf_vocabulary(folder: Path, vocab_size: int) -> GGUFVocabulary:
    """Return the tokenizer of a model's folder, with as many tokens as the model has rows.

    Raises ValueError where llama.cpp has no such tokenizer.
    """
    path = tokenizer_file(folder)
    read = from_sentencepiece if path.name == "tokenizer.model" else from_tokenizer_json
    vocabulary = read(path)
    missing = range(len(vocabulary.tokens), vocab_size)
    vocabulary.tokens.extend(f"[PAD{i}]" for i in missing)
    vocabulary.types.extend(UNUSED for _ in missing)
    if vocabulary.scores is not None:
        vocabulary.scores.extend(-1000.0 for _ in missing)
    return vocabulary


def from_sentencepiece(path: Path) -> GGUFVocabulary:
    """Return the vocabulary of a SentencePiece model and the tokens added to it.

    An unused piece, which SentencePiece splits again, llama.cpp would join. It joins none that has
    a space: its texts have ▁ there. So such a piece gets a space, which shows where it is written.
    A space that is a piece of byte fallback alone is ▁: llama.cpp would take the bytes of ▁.
    It does not make one space of several, which no Llama asks for: a warning says so.
    """
    proto, added = read_vocabulary(path)
    spec = proto.normalizer_spec
    if spec.remove_extra_whitespaces:
        warn(f"{path} makes one space of several, and llama.cpp does not: it reads other tokens")
    tokens = [
        with_space(piece.piece) if piece.type == UNUSED else piece.piece.replace(" ", "▁")
        for piece in proto.pieces
    ]
    types = [NORMAL if piece.type == UNUSED else piece.type for piece in proto.pieces]
    if "▁" not in tokens and "<0x20>" in tokens:
        space = tokens.index("<0x20>")
        tokens[space], types[space] = "▁", NORMAL
    scores = [piece.score for piece in proto.pieces]
    for token in added:
        missing = range(len(tokens), token.id)
        tokens += [*(f"[PAD{i}]" for i in missing), token.content]
        types += [*(UNUSED for _ in missing), CONTROL if token.special else USER_DEFINED]
        scores += [-1000.0] * (len(missing) + 1)
    return GGUFVocabulary(
        "llama",
        "default",
        tokens,
        types,
        scores,
        unknown=proto.trainer_spec.unk_id,
        space_prefix=spec.add_dummy_prefix,
        extra_spaces=spec.remove_extra_whitespaces,
    )


def with_space(piece: str) -> str:
    """Return the piece with a space in it: before the last character, where it has none."""
    piece = piece.replace("▁", " ")
    return piece if " " in piece else f"{piece[:-1]} {piece[-1:]}"


def from_tokenizer_json(path: Path) -> GGUFVocabulary:
    """Return the vocabulary of a tokenizer.json of byte-pair encoding."""
    content = read_json(path)
    model = content["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"{path} is of type {model.get('type')}: llama.cpp needs BPE here")
    ids = token_ids(content)
    size = max(ids.values()) + 1
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for name, i in ids.items():
        tokens[i], types[i] = name, NORMAL
    for token in content["added_tokens"]:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if not model.get("byte_fallback"):
        return GGUFVocabulary("gpt2", pre_tokenizer(content, path), tokens, types, merges=merges)

    scores = [0.0] * size
    for rank, merge in reversed(list(enumerate(merges))):
        scores[ids[merge.replace(" ", "")]] = -float(rank)
    for name, i in ids.items():
        if len(name) == 6 and name.startswith("<0x"):
            types[i] = BYTE
    unknown = ids.get(model.get("unk_token"))
    if unknown is not None:
        types[unknown] = UNKNOWN
    return GGUFVocabulary(
        "llama", "default", tokens, types, scores, None, unknown, space_prefix=puts_space(path)
    )


def puts_space(path: Path) -> bool:
    """Whether a tokenizer.json puts a space before a text."""
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file(str(path)).encode("a", add_special_tokens=False).tokens
    return tokens[:1] != ["a"]


def pre_tokenizer(content: dict, path: Path) -> str:
    """Return llama.cpp's name of how a tokenizer.json splits a text into words.

    Raises ValueError where it has none.
    """
    top = content.get("pre_tokenizer") or {}
    steps = []
    for step in top.get("pretokenizers", [top]):
        if step.get("type") == "Split":
            steps.append(step["pattern"].get("Regex"))
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            steps.append(DIGITS)
        elif step.get("type") == "ByteLevel":
            steps += [GPT2] if step.get("use_regex", True) else []
        else:
            steps.append(step.get("type"))
    name = PRE_TOKENIZERS.get(tuple(steps))
    if name is None:
        raise ValueError(
            f"{path} splits words in a way for which llama.cpp may have a name that is not known "
            "here: give --format hf, and convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    return name
