"""The tokenizer of a checkpoint, in whichever format: what a model's folder gets of it.

file of the checkpoint                  format                        file of the model's folder
tokenizer.model, tokenizer.model.v3     SentencePiece                 tokenizer.model
tokenizer.model                         tiktoken's, Llama 3           tokenizer.json, made
tekken.json                             Mistral's Tekken              tokenizer.json, made
tokenizer.json                          Hugging Face's                tokenizer.json

Where a folder has a tokenizer.json beside one of the others, that is a conversion of it, or has
more: the other is taken, with which the model was first trained, where the two have the same tokens
under the same ids; else tokenizer.json, which is what transformers reads. Where a folder has
several SentencePiece models, the one with as many tokens as the model is taken.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sentencepiece import SentencePieceProcessor

from parts.byte_level_bpe import (
    TEKKEN_BOS,
    TEKKEN_EOS,
    is_tiktoken,
    llama3_tokenizer,
    tekken_tokenizer,
)
from parts.files import check_content, find_file, read_json
from parts.tokenizers import END_NAMES, AddedToken, read_added_tokens

LLAMA3_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


class SourceTokenizer(NamedTuple):
    """What a model's folder gets: files by their names, each a path to copy or its content; the
    token that begins a text, None for none; those that end one, of which the first ends the texts
    of a training; how many token ids there are; and the file that it all comes from.
    """

    files: dict[str, Path | bytes]
    bos_id: int | None
    eos_ids: list[int]
    n_tokens: int
    source: Path


class Candidate(NamedTuple):
    """A tokenizer that a folder has: its file, the ids of its tokens by their names, its own tokens
    of beginning and end, its special and other added tokens, and what a model's folder gets.
    """

    path: Path
    ids: dict[str, int]
    bos_id: int | None
    ends: list[int]
    files: dict[str, Path | bytes]

    @property
    def n_tokens(self) -> int:
        return max(self.ids.values(), default=-1) + 1


def read_source_tokenizer(
    folder: Path, vocab_size: int, hf_config: dict | None = None
) -> SourceTokenizer:
    """Return the tokenizer of a checkpoint.

    vocab_size: tokens of the model; hf_config: config.json of Hugging Face's layout, else None.
    Raises FileNotFoundError, or ValueError where the file is damaged or is of another model.
    """
    config = read_tokenizer_config(folder)
    chosen = choose(list(candidates(folder)), vocab_size, folder)
    if chosen.n_tokens > vocab_size:
        raise ValueError(
            f"{chosen.path} has {chosen.n_tokens} tokens, the model {vocab_size}: it is of another"
        )
    bos_id, eos_ids = beginning_and_ends(chosen, config, folder, hf_config or {})
    files = {**chosen.files, **chat_template(folder, config)}
    return SourceTokenizer(files, bos_id, eos_ids, chosen.n_tokens, chosen.path)


# -------------------------------------------------------------------------------------------------
# Which file


def candidates(folder: Path) -> Iterator[Candidate]:
    """Yield the tokenizers in a folder, a tokenizer.json last."""
    for path in (folder / "tokenizer.model", *sorted(folder.glob("tokenizer.model.v*"))):
        if path.is_file():
            check_whole(path)
            read = read_llama3 if is_tiktoken(path) else read_sentencepiece
            yield read(path)
    for name, read in {"tekken.json": read_tekken, "tokenizer.json": read_hugging_face}.items():
        if (folder / name).is_file():
            check_whole(folder / name)
            yield read(folder / name)


def check_whole(path: Path) -> None:
    """Raise ValueError where a file is empty, or is only what a download has left in its place."""
    check_content(path)
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: download it again")


def choose(found: list[Candidate], vocab_size: int, folder: Path) -> Candidate:
    """Return the tokenizer that the model was trained with. Raises FileNotFoundError."""
    if not found:
        raise FileNotFoundError(
            f"{folder / 'tokenizer.model'} is missing, and so are tokenizer.json and tekken.json: "
            "copy the model's tokenizer there"
        )
    *originals, last = found
    if last.path.name != "tokenizer.json":
        originals = found
    fitting = [one for one in originals if one.n_tokens <= vocab_size]
    best = max(fitting or originals, key=lambda one: one.n_tokens, default=last)
    if best is last or last in originals or last.n_tokens > vocab_size >= best.n_tokens:
        return best
    agree = all(last.ids.get(name) == i for name, i in best.ids.items())
    return best if agree and last.n_tokens <= best.n_tokens else last


# -------------------------------------------------------------------------------------------------
# Each format


def read_sentencepiece(path: Path) -> Candidate:
    """Read a SentencePiece model and the tokens that were added to it. Raises ValueError."""
    try:
        model = SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        raise ValueError(
            f"{path} is no SentencePiece model and not Llama 3's, or is damaged: download it again"
        ) from error
    n_pieces = model.vocab_size()
    if not n_pieces:
        raise ValueError(f"{path} is empty: download it again")
    ids = {model.id_to_piece(i): i for i in range(n_pieces)}
    added = [token for token in read_added_tokens(path.parent) if token.id >= n_pieces]
    files = {"tokenizer.model": path}
    if added:
        files["added_tokens.json"] = to_json({token.content: token.id for token in added})
    legacy = read_tokenizer_config(path.parent).get("legacy") is not False or "[INST]" in ids
    flagged = [token for token in added if token != AddedToken(token.content, token.id)]
    if flagged or not legacy:
        flags = {token.id: {**token._asdict(), "normalized": False} for token in flagged}
        for flag in flags.values():
            del flag["id"]
        files["tokenizer_config.json"] = to_json({"legacy": legacy, "added_tokens_decoder": flags})
    ids |= {token.content: token.id for token in added}
    ends = [model.eos_id()] if model.eos_id() >= 0 else []
    return Candidate(path, ids, model.bos_id() if model.bos_id() >= 0 else None, ends, files)


def read_llama3(path: Path) -> Candidate:
    """Read Llama 3's tokenizer.model. 3.0, which has no scaled RoPE, has fewer special tokens."""
    params = path.with_name("params.json")
    scaled = bool(read_json(params).get("use_scaled_rope")) if params.is_file() else True
    content = llama3_tokenizer(path, scaled)
    ids = token_ids(json.loads(content))
    ends = [ids[name] for name in LLAMA3_ENDS if name in ids]
    return Candidate(path, ids, ids["<|begin_of_text|>"], ends, {"tokenizer.json": content})


def read_tekken(path: Path) -> Candidate:
    """Read Tekken's tekken.json."""
    content = tekken_tokenizer(path)
    ids = token_ids(json.loads(content))
    return Candidate(path, ids, TEKKEN_BOS, [TEKKEN_EOS], {"tokenizer.json": content})


def read_hugging_face(path: Path) -> Candidate:
    """Read Hugging Face's tokenizer.json, and the tokens that tokenizer_config.json adds to it.
    Raises ValueError.
    """
    from tokenizers import Tokenizer

    content = read_json(find_file(path))
    try:
        model = Tokenizer.from_file(str(path))
        ids = token_ids(content)
    except Exception as error:  # which the package raises, of no other class
        raise ValueError(f"{path} is no tokenizer of Hugging Face's: {error}") from error
    if content.get("decoder") is None:
        raise ValueError(f"{path} does not say how tokens become text (decoder)")
    files: dict[str, Path | bytes] = {"tokenizer.json": path}
    taken = set(ids.values())
    added = [token for token in read_added_tokens(path.parent) if token.content not in ids]
    added = [token for token in added if token.id not in taken]
    if added:
        listed = [{**token._asdict(), "normalized": False} for token in added]
        content["added_tokens"] = [*content["added_tokens"], *listed]
        files["tokenizer.json"] = to_json(content)
        ids |= {token.content: token.id for token in added}
        model = Tokenizer.from_str(json.dumps(content))
    for i, token in model.get_added_tokens_decoder().items():
        if ids[token.content] != i:  # the package numbers them in their order
            raise ValueError(f"{path} gives {token.content} an id that leaves a gap before it")
    if max(ids.values()) >= model.get_vocab_size():
        raise ValueError(f"{path} has ids without a token below that of its last")
    model.no_truncation()
    begins = model.encode("a").ids[:1] != model.encode("a", add_special_tokens=False).ids[:1]
    ends = [ids[name] for name in END_NAMES if name in ids][:1]
    return Candidate(path, ids, model.encode("a").ids[0] if begins else None, ends, files)


def token_ids(content: dict) -> dict[str, int]:
    """Return the ids of the tokens in a tokenizer.json's content, by their names."""
    vocab = content["model"]["vocab"]
    if not isinstance(vocab, dict):  # with the probability of each
        vocab = {name: i for i, (name, _) in enumerate(vocab)}
    return vocab | {token["content"]: token["id"] for token in content["added_tokens"]}


# -------------------------------------------------------------------------------------------------
# What lies beside it


def read_tokenizer_config(folder: Path) -> dict:
    """Return what tokenizer_config.json says, and of special_tokens_map.json what it does not."""
    paths = [folder / "special_tokens_map.json", folder / "tokenizer_config.json"]
    contents = [read_json(path) for path in paths if path.is_file()]
    return {name: value for content in contents for name, value in content.items()}


def beginning_and_ends(
    chosen: Candidate, config: dict, folder: Path, hf_config: dict
) -> tuple[int | None, list[int]]:
    """Return the token that begins a text, None for none, and those that end one.

    As transformers 5 does: a tokenizer.json says itself what begins a text; with a SentencePiece
    model its own token does, unless tokenizer_config.json has `"add_bos_token": false`. Any token
    of tokenizer_config.json, generation_config.json and config.json ends a text, the first of them
    that of a training.
    """
    bos_id = chosen.bos_id
    if "tokenizer.model" in chosen.files:
        bos_id = chosen.ids.get(name_of(config.get("bos_token")), bos_id)
        bos_id = bos_id if config.get("add_bos_token", True) else None
    generation = folder / "generation_config.json"
    ends = [chosen.ids.get(name_of(config.get("eos_token")))]
    for source in (read_json(generation) if generation.is_file() else {}, hf_config):
        listed = source.get("eos_token_id")
        ends += listed if isinstance(listed, list) else [listed]
    ends = [i for i in ends if type(i) is int and 0 <= i < chosen.n_tokens]
    ends = list(dict.fromkeys(ends)) or chosen.ends
    if not ends:
        raise ValueError(f"{chosen.path} has no token for the end of a text (eos_token)")
    if bos_id is not None and bos_id >= chosen.n_tokens:
        raise ValueError(f"{chosen.path} begins a text with token {bos_id}, which it does not have")
    return bos_id, ends


def name_of(token: object) -> str | None:
    """Return the text of a token as tokenizer_config.json has it, None where it has none."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def chat_template(folder: Path, config: dict) -> dict[str, Path | bytes]:
    """Return the chat template as a file of a model's folder; nothing where there is none."""
    path, template = folder / "chat_template.jinja", config.get("chat_template")
    if path.is_file():
        return {path.name: find_file(path)}
    if isinstance(template, list):  # of named ones
        named = [one for one in template if isinstance(one, dict) and one.get("name") == "default"]
        template = named[-1].get("template") if named else None
    return {path.name: to_bytes(template)} if isinstance(template, str) and template else {}


def to_json(content: dict) -> bytes:
    """Return the content as JSON. Equal content gives equal bytes."""
    return to_bytes(json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def to_bytes(text: str) -> bytes:
    """Return a text of the tokenizer's files as UTF-8. Raises ValueError."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the tokenizer's JSON files hold half a character: {error}") from error
