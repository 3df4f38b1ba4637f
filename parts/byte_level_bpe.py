"""Byte-level BPE as tiktoken and Tekken write it, made into Hugging Face's tokenizer.json.

Both formats are a list of byte strings, each with a rank, beside a pattern that splits a text into
words. A word that is a token is that token. Of any other, tiktoken merges the two neighbours whose
joined bytes have the lowest rank, until no neighbours join to a token.

tokenizer.json has merges instead of ranks: pairs of tokens, in their order. So every way to split a
token into two others is a merge here, in the order of the tokens' ranks; of those the trained
tokenizer only ever needs one, and the others cost nothing.
"""

import base64
import binascii
import json
from pathlib import Path

from parts.files import read_json

# Llama 3's words (Meta's package llama-models): contractions; letters; up to three digits;
# punctuation; line ends; white space.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_LLAMA3_SPECIAL = 256
RESERVED = "<|reserved_special_token_{}|>"

# The first special tokens of a tekken.json that lists none (mistral-common's defaults); the others
# have names that no text holds.
TEKKEN_BOS, TEKKEN_EOS = 1, 2
TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
)
MOST_SPECIAL = 1 << 16  # of a tekken.json; Mistral's have 1,000


# -------------------------------------------------------------------------------------------------
# Read


def read_tiktoken(path: Path) -> list[bytes]:
    """Return the tokens of a file in tiktoken's format, in the order of their ranks: a line holds a
    token in base64 and its rank.

    Raises ValueError, which names the line.
    """
    tokens: list[bytes] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            tokens.append(base64.b64decode(token, validate=True))
            in_order = int(rank) == len(tokens) - 1
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path}, line {number} is no token and its rank") from error
        if not in_order:
            raise ValueError(f"{path}, line {number} is out of order: download it again")
    check_tokens(tokens, path)
    return tokens


def is_tiktoken(path: Path) -> bool:
    """Whether a file begins as tiktoken's do: a token in base64, a space and the rank 0."""
    with open(path, "rb") as file:
        words = file.readline(1000).split()
    try:
        return (
            len(words) == 2 and words[1] == b"0" and bool(base64.b64decode(words[0], validate=True))
        )
    except binascii.Error:
        return False


def check_tokens(tokens: list[bytes], path: Path) -> None:
    """Raise ValueError where tokens are not different, or a byte is none of them."""
    known = set(tokens)
    if len(known) < len(tokens) or b"" in known:
        raise ValueError(f"{path} has a token twice, or an empty one: download it again")
    if any(bytes([value]) not in known for value in range(256)):
        raise ValueError(f"{path} lacks tokens of one byte: it is damaged, download it again")


def check_pattern(pattern: str) -> None:
    """Raise ValueError or TypeError where no tokenizer can split words by this pattern."""
    from tokenizers import Regex

    try:
        Regex(pattern)
    except Exception as error:  # which the package raises, of no other class
        raise ValueError(f"pattern {pattern!r}") from error


# -------------------------------------------------------------------------------------------------
# Convert


def llama3_tokenizer(path: Path, scaled_rope: bool = True) -> bytes:
    """Return the tokenizer.json of Llama 3's tokenizer.model.

    scaled_rope: whether the model is of 3.1 or later, whose special tokens are named otherwise.
    """
    tokens = read_tiktoken(path)
    special = {len(tokens) + i: name for i, name in enumerate(llama3_special(scaled_rope))}
    return tokenizer_json(tokens, 0, special, LLAMA3_PATTERN, len(tokens))


def llama3_special(scaled_rope: bool) -> list[str]:
    """Return the names of Llama 3's 256 special tokens, as of 3.1 and later or of 3.0. The reserved
    ones are counted past the others in each.
    """
    text = ["<|begin_of_text|>", "<|end_of_text|>", RESERVED.format(0), RESERVED.format(1)]
    headers = ["<|start_header_id|>", "<|end_header_id|>"]
    if scaled_rope:
        names = [*text, "<|finetune_right_pad_id|>", "<|step_id|>", *headers]
        names += ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"]
        n_reserved = 2
    else:
        names = [*text, RESERVED.format(2), RESERVED.format(3), *headers]
        names += [RESERVED.format(4), "<|eot_id|>"]
        n_reserved = 5
    n_left = N_LLAMA3_SPECIAL - len(names)
    return [*names, *(RESERVED.format(n_reserved + i) for i in range(n_left))]


def tekken_tokenizer(path: Path) -> bytes:
    """Return the tokenizer.json of Mistral's tekken.json. Its special tokens come first, so that an
    id is a rank and their number. Raises ValueError.
    """
    content = read_json(path)
    try:
        config = content["config"]
        n_special = config["default_num_special_tokens"]
        if not 0 < n_special <= MOST_SPECIAL:
            raise ValueError(f"default_num_special_tokens is {n_special}")
        n_tokens = config["default_vocab_size"] - n_special
        tokens = [base64.b64decode(entry["token_bytes"]) for entry in content["vocab"][:n_tokens]]
        listed = content.get("special_tokens")
        names = dict(enumerate(TEKKEN_SPECIAL))
        if listed is not None:
            names = {entry["rank"]: "".join(entry["token_str"]) for entry in listed}
        special = {i: names.get(i, f"<SPECIAL_{i}>") for i in range(n_special)}
        ranks = [entry["rank"] for entry in content["vocab"][:n_tokens]]
        pattern = config["pattern"]
        check_pattern(pattern)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no tokenizer of Tekken ({error!r}): download it") from error
    if TEKKEN_EOS not in special or len(set(special.values())) < n_special:
        raise ValueError(f"{path} has too few special tokens, or one twice: download it")
    if ranks != list(range(n_tokens)):
        raise ValueError(f"{path} has too few tokens, or their ranks are not in order: download it")
    check_tokens(tokens, path)
    return tokenizer_json(tokens, n_special, special, pattern, TEKKEN_BOS)


def tokenizer_json(
    tokens: list[bytes],
    first_id: int,
    special: dict[int, str],
    pattern: str,
    bos_id: int | None,
    normalizer: dict | None = None,
) -> bytes:
    """Return Hugging Face's tokenizer.json of a byte-level BPE. Equal tokens give equal bytes.

    tokens: in the order of their ranks; first_id: the id of the first; special: names by their ids;
    pattern: what the words of a text match; bos_id: the token that a text begins with.
    """
    letters = byte_letters()
    spelled = [token.decode("latin-1").translate(letters) for token in tokens]
    vocab = {token: first_id + rank for rank, token in enumerate(spelled)}
    if first_id:  # the package numbers those that the vocabulary lacks from its end on
        vocab = {name: i for i, name in special.items()} | vocab
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    split["invert"] = False
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **added, "special": True} for i, name in special.items()
        ],
        "normalizer": normalizer,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**byte_level, "use_regex": False}],
        },
        "post_processor": None if bos_id is None else begin_with(bos_id, special[bos_id]),
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": recover_merges(spelled),
        },
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def recover_merges(tokens: list[str]) -> list[str]:
    """Return the merges that give tokens, which are in the order of their ranks."""
    known = set(tokens)
    return [
        f"{token[:i]} {token[i:]}"
        for token in tokens
        for i in range(1, len(token))
        if token[:i] in known and token[i:] in known
    ]


def begin_with(token_id: int, name: str) -> dict:
    """Return the post-processor that puts a token before a text."""
    begin = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, begin, second],
        "special_tokens": {name: {"id": name, "ids": [token_id], "tokens": [name]}},
    }


def byte_letters() -> dict[int, int]:
    """Return the code point that stands for each byte in a token's spelling (GPT-2, 2019): its own
    in Latin-1 where that is printed, and of the others, in their order, those from 256 on.
    """
    printed = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printed]
    return {value: value for value in printed} | {value: 256 + i for i, value in enumerate(others)}
