"""A model's tokenizer for other tools: what transformers, mlx-lm and vLLM read.

They build a tokenizer out of a SentencePiece model that reads other ids: they take merges in the
order of the pieces, not of the scores. So a tokenizer.json is made of it here.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto

from parts import byte_level_bpe
from parts.files import read_json
from parts.source_tokenizers import token_ids, to_json
from parts.tokenizers import AddedToken, read_added_tokens, tokenizer_file

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
UNIGRAM = 1  # a model's type; all of Llama's and Mistral's are BPE, 2


class Vocabulary(NamedTuple):
    """A SentencePiece model, as protobuf, and the tokens added to it, by their ids."""

    proto: sentencepiece_proto.ModelProto
    added: list[AddedToken]


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a tokenizer.model and what lies beside it. Raises ValueError where it is damaged."""
    proto = sentencepiece_proto.ModelProto()
    try:
        SentencePieceProcessor(model_proto=path.read_bytes())
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # of protobuf's own class
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from error
    n_pieces = len(proto.pieces)
    return Vocabulary(proto, [t for t in read_added_tokens(path.parent) if t.id >= n_pieces])


def begin_and_ends(folder: Path, params: dict) -> tuple[int | None, list[int]]:
    """Return the ids of the token that begins a text, and of those that end one.

    params: the values of `ModelArgs`. A folder of an older convert.py leaves them to the tokenizer.
    """
    if params.get("eos_ids"):
        return params.get("bos_id"), params["eos_ids"]
    spec = read_vocabulary(folder / "tokenizer.model").proto.trainer_spec
    return spec.bos_id if spec.bos_id >= 0 else None, [spec.eos_id]


# -------------------------------------------------------------------------------------------------
# The files


def tokenizer_files(
    folder: Path, bos_id: int | None, eos_ids: list[int], context: int
) -> dict[str, bytes]:
    """Return the contents of the tokenizer's files for transformers, by name.

    folder: of convert.py; bos_id: None where no token begins a text; context: positions.
    """
    source = tokenizer_file(folder)
    kept = (source.name, "added_tokens.json")
    files = {name: (folder / name).read_bytes() for name in kept if (folder / name).is_file()}
    if source.name == "tokenizer.json":
        names = {i: name for name, i in token_ids(read_json(source)).items()}
        config = {"bos_token": names.get(bos_id)}
    else:
        vocabulary = read_vocabulary(source)
        pieces, spec = vocabulary.proto.pieces, vocabulary.proto.trainer_spec
        names = dict(enumerate(piece.piece for piece in pieces))
        names |= {token.id: token.content for token in vocabulary.added}
        begin = spec.bos_id if bos_id is None else bos_id
        config = {"bos_token": names.get(begin), "unk_token": names.get(spec.unk_id)}
        config["legacy"] = True
        beside = folder / "tokenizer_config.json"
        config |= read_json(beside) if beside.is_file() else {}
        if spec.model_type != UNIGRAM:  # of which tokenizers' own reader is right
            files["tokenizer.json"] = to_tokenizer_json(vocabulary).encode()
    if "tokenizer.json" in files:
        files["tokenizer.json"] = begin_with(files["tokenizer.json"], bos_id, names)
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": names.get(eos_ids[0]),
        "add_bos_token": bos_id is not None,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    files["tokenizer_config.json"] = to_json(config)
    return files


def begin_with(content: bytes, bos_id: int | None, names: dict[int, str]) -> bytes:
    """Return a tokenizer.json that puts `bos_id` before a text, nothing where it is None: what
    tokenizer_config.json says of it, transformers does not read. As it is where it does so already.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(content.decode())
    with_it, without = (tokenizer.encode("a", add_special_tokens=b).ids for b in (True, False))
    if with_it == ([] if bos_id is None else [bos_id]) + without:
        return content
    processor = None if bos_id is None else byte_level_bpe.begin_with(bos_id, names[bos_id])
    return to_json({**json.loads(content), "post_processor": processor})


# -------------------------------------------------------------------------------------------------
# A tokenizer.json of a SentencePiece model


def to_tokenizer_json(vocabulary: Vocabulary) -> str:
    """Return the content of a tokenizer.json that reads the ids which SentencePiece does.

    SentencePiece joins two neighbours whose joint piece has the highest score; byte-pair encoding
    joins the pair whose merge stands first. A piece may arise from any pair that makes it up.
    Unused pieces are joined by SentencePiece, and split again: here no merge makes them, which in
    rare runs of white space is not the same.
    """
    from tokenizers import AddedToken as Token
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers

    proto = vocabulary.proto
    spec = proto.normalizer_spec
    ids, merges = merge_table(proto)
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece
    byte_fallback = any(piece.type == BYTE for piece in proto.pieces)
    model = models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
    tokenizer = Tokenizer(model)

    steps = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" +"), " "),
        ]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    decode = [decoders.Replace("▁", " ")] if spec.escape_whitespaces else []
    decode += [decoders.ByteFallback(), decoders.Fuse()]
    decode += [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(decode)

    control = [p.piece for p in proto.pieces if p.type in (CONTROL, UNKNOWN)]
    words = [p.piece for p in proto.pieces if p.type == USER_DEFINED]
    tokenizer.add_special_tokens([Token(name, normalized=False) for name in control])
    tokenizer.add_tokens([Token(name, normalized=False) for name in words])
    add_tokens(tokenizer, vocabulary.added)
    return tokenizer.to_str()


def merge_table(proto: sentencepiece_proto.ModelProto) -> tuple[dict, list[tuple[str, str]]]:
    """Return the ids of the pieces by their texts, and the merges that make them, best first.

    A byte of ASCII that is only a piece of byte fallback is spelled as its character where others
    contain it: byte-pair encoding joins what is in the vocabulary only.
    """
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    made = [piece for piece in proto.pieces if piece.type in (NORMAL, USER_DEFINED)]
    used = set("".join(piece.piece for piece in made))
    for piece in proto.pieces:
        if piece.type == BYTE and int(piece.piece[3:5], 16) < 128:
            character = chr(int(piece.piece[3:5], 16))
            if character in used and character not in ids:
                ids[character] = ids.pop(piece.piece)
    joined = {piece.piece for piece in made} | (used & ids.keys())
    merges = [
        (piece.piece[:i], piece.piece[i:])
        for piece in sorted(made, key=lambda piece: -piece.score)
        for i in range(1, len(piece.piece))
        if piece.piece[:i] in joined and piece.piece[i:] in joined
    ]
    return ids, merges


def add_tokens(tokenizer, added: Iterable[AddedToken]) -> None:
    """Add tokens to a `tokenizers.Tokenizer`. Raises ValueError where ids are left out."""
    from tokenizers import AddedToken as Token

    for token in added:
        flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
        new = Token(token.content, special=token.special, normalized=False, **flags)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([new])
        if tokenizer.token_to_id(token.content) != token.id:
            raise ValueError(f"the added token {token.content} has the id {token.id}, not the next")
