"""Text to token ids and back, whichever file a model's tokenizer is; and text as a stream.

tokenizer.model   a SentencePiece model (Llama 1 and 2, Mistral to v3, Yi); tokens that were added
                  later stand beside it, in added_tokens.json
tokenizer.json    Hugging Face's (Llama 3, Tekken, Qwen), read by the package `tokenizers`

Special tokens, such as `</s>` or `<|im_end|>`, are no text: decoding leaves them out, and a text
that names one is encoded as the characters that it is, unless it is asked to be read as the token.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from parts.added_tokens import BESIDE, NOTHING, AddedToken, any_of, read_added_tokens
from parts.files import check_content, digest, read_json

FILES = ("tokenizer.model", "tokenizer.json")  # of which a model's folder has one
# What ends a text, where nothing beside a tokenizer.json says so.
END_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>")
# A character that is part of no token: text after it is not at the beginning.
GUARD = chr(0x10FFFD)


class Tokenizer:
    """The tokenizer of a `tokenizer.model` or `tokenizer.json`.

    bos_id: the token that begins a text, None for none. eos_ids: tokens that end one, of which the
    first ends the texts of a training. By default what params.json says beside the file, else what
    the file itself does. special_tokens: whether texts that name special tokens mean these.
    Raises FileNotFoundError or ValueError when the file is missing or malformed, or lacks a token.
    """

    def __init__(
        self,
        model_path: str | Path,
        bos_id: int | None = None,
        eos_ids: Iterable[int] | None = None,
        special_tokens: bool = False,
    ):
        self.path = Path(model_path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{model_path} is missing: convert the model with convert.py")
        check_content(model_path)
        kind = HuggingFace if self.path.suffix == ".json" else SentencePiece
        self._reader = kind(self.path)
        if eos_ids is None:
            bos_id, eos_ids = params_ids(self.path.parent) or self._reader.own_ids()
        eos_ids = list(eos_ids)
        ids = [i for i in (bos_id, *eos_ids) if i is not None]
        if not eos_ids or not all(0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"{model_path} has no token for the beginning or the end of a text")
        self.bos_id, self.eos_ids = bos_id, frozenset(eos_ids)
        self._eos_id = eos_ids[0]
        self.special_tokens = special_tokens
        self._reader.hide({bos_id, self._eos_id} - {None}, self.eos_ids)

    @property
    def eos_id(self) -> int:
        """The id of the token that ends a text of the training."""
        return self._eos_id

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return self._reader.vocab_size

    def encode(
        self, s: str, eos: bool = False, bos: bool = True, special_tokens: bool | None = None
    ) -> list[int]:
        """Return the token ids of `s`, after the token that begins a text where the model has one;
        with `eos`, the token that ends one follows. Where special tokens are read, a text that
        names these two itself gets no second ones.

        special_tokens: whether they are read; by default as the tokenizer was made.
        """
        reads = self.special_tokens if special_tokens is None else special_tokens
        return self._with_ends(self._reader.encode(s, reads), eos, bos, reads)

    def encode_batch(
        self,
        texts: list[str],
        eos: bool = False,
        bos: bool = True,
        special_tokens: bool | None = None,
    ) -> list[list[int]]:
        """Return what `encode` does of each text, computed on all cores."""
        reads = self.special_tokens if special_tokens is None else special_tokens
        encoded = self._reader.encode_batch(texts, reads)
        return [self._with_ends(ids, eos, bos, reads) for ids in encoded]

    def _with_ends(self, ids: list[int], eos: bool, bos: bool, reads: bool) -> list[int]:
        if bos and self.bos_id is not None and not (reads and ids[:1] == [self.bos_id]):
            ids = [self.bos_id, *ids]
        if eos and not (reads and ids[-1:] == [self.eos_id]):
            ids = [*ids, self.eos_id]
        return ids

    def digest(self) -> str:
        """Return a digest of what the ids of a text depend on."""
        files = [self.path, *(self.path.parent / name for name in BESIDE)]
        contents = [path.read_bytes() for path in files if path.is_file()]
        package = "tokenizers" if self.path.suffix == ".json" else "sentencepiece"
        ends = self.bos_id, sorted(self.eos_ids), self.eos_id, self.special_tokens
        about = repr((ends, version(package), [len(content) for content in contents]))
        return digest(b"".join([about.encode(), *contents]))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids. Special tokens have none."""
        return self._reader.decode(ids)

    def may_change(self, token: int) -> bool:
        """Whether the text of a token may yet become another by the token that follows."""
        return token in self._reader.changing

    def name_of(self, token: int) -> str:
        """Return what texts name a special token by."""
        return self._reader.name_of(token)

    @property
    def special_names(self) -> frozenset[str]:
        """What texts name special tokens by."""
        return self._reader.names

    def find_special(self, text: str) -> str | None:
        """Return the first special token that a text names; None where it names none."""
        match = self._reader.pattern.search(text)
        return match[0] if match else None


# -------------------------------------------------------------------------------------------------
# The readers of each file. `encode(s, reads)`: whether it reads special tokens; no token is added.


def n_cores() -> int:
    """Return the number of cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


class SentencePiece:
    """A SentencePiece model (Kudo and Richardson, 2018), and the tokens added to it.

    Where special tokens are read, the texts between them are encoded one by one, as transformers
    does: each as if it began a text, or, with `"legacy": false` in tokenizer_config.json, only what
    does. In Mistral's models, whose [INST] is one, a space next to a special token belongs to it,
    as mistral-common writes them out.
    """

    def __init__(self, path: Path):
        try:
            self._model = SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from error
        model, folder = self._model, path.parent
        own = [
            AddedToken(model.id_to_piece(i), i)
            for i in range(model.vocab_size())
            if model.is_control(i) or model.is_unknown(i)
        ]
        self._n_pieces = model.vocab_size()
        added = [token for token in read_added_tokens(folder) if token.id >= self._n_pieces]
        self._added = {token.id: token for token in added}
        self.vocab_size = max([self._n_pieces - 1, *self._added]) + 1
        self._tokens = {token.content: token for token in (*own, *added)}
        self._names_and_words = any_of(self._tokens)
        self._is_mistrals = "[INST]" in {token.content for token in own}
        config = folder / "tokenizer_config.json"
        self._legacy = not config.is_file() or read_json(config).get("legacy") is not False
        self._guard = model.encode(GUARD)
        self.changing: set[int] = set()

    def own_ids(self) -> tuple[int | None, list[int]]:
        return self._model.bos_id(), [self._model.eos_id()]

    def name_of(self, token: int) -> str:
        added = token >= self._n_pieces
        return self._added[token].content if added else self._model.id_to_piece(token)

    def hide(self, own: set[int], ends: frozenset[int]) -> None:
        """Take these for special tokens too, of `ends` what is no piece of a text."""
        ids = own | ends
        self._hidden = {i for i, token in self._added.items() if token.special or i in ids}
        words = {i: token.content for i, token in self._added.items() if i not in self._hidden}
        self._words = any_of(words.values())
        self.names = frozenset(self._tokens.keys() - words.values())
        self.pattern = any_of(self.names)

    def encode(self, s: str, reads: bool) -> list[int]:
        if not reads and self._words is NOTHING:
            return self._model.encode(s)
        ids, start, after_special = [], 0, False
        for token, begin, end in self._find(s, self._names_and_words if reads else self._words):
            strips = self._is_mistrals and token.id < self._n_pieces
            ids += self._encode_between(s[start:begin], start == 0, after_special, strips)
            ids.append(token.id)
            start, after_special = end, strips
        return ids + self._encode_between(s[start:], start == 0, after_special, False)

    def encode_batch(self, texts: list[str], reads: bool) -> list[list[int]]:
        if not reads and self._words is NOTHING:
            return self._model.encode(texts, num_threads=n_cores())
        return [self.encode(s, reads) for s in texts]

    def _find(self, s: str, pattern: re.Pattern) -> Iterator[tuple[AddedToken, int, int]]:
        """Yield the tokens that a text names, and where each begins and ends."""
        start = 0
        for match in pattern.finditer(s):
            token, (begin, end) = self._tokens[match[0]], match.span()
            neighbours = s[max(begin - 1, 0) : begin] + s[end : end + 1]
            if begin < start or (token.single_word and re.search(r"\w", neighbours)):
                continue
            if token.lstrip:
                begin = max(start, len(s[:begin].rstrip()))
            if token.rstrip:
                end = len(s) - len(s[end:].lstrip())
            yield token, begin, end
            start = end

    def _encode_between(self, s: str, first: bool, after: bool, before: bool) -> list[int]:
        """Return the ids of a text between special tokens. first: whether it begins the whole;
        after, before: whether the space at its beginning or end belongs to a special token.
        """
        s = s.removeprefix(" ") if after else s
        s = s.removesuffix(" ") if before else s
        if not s or first or self._legacy or self._is_mistrals:
            return self._model.encode(s)
        return self._model.encode(GUARD + s)[len(self._guard) :]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids. Special tokens have none."""
        texts, run = [], []
        ids = [i for i in ids if i not in self._hidden]
        for token in ids if self._added else []:
            if token < self._n_pieces:
                run.append(token)
            elif token in self._added:
                texts += [self._decode_run(run, not texts), self._added[token].content]
                run = []
        return "".join([*texts, self._decode_run(run if self._added else ids, not texts)])

    def _decode_run(self, ids: list[int], first: bool) -> str:
        if first or self._legacy:
            return self._model.decode(ids)
        return self._model.decode(self._guard + ids)[len(self._model.decode(self._guard)) :]


class HuggingFace:
    """A tokenizer.json, read by Hugging Face's package `tokenizers`."""

    def __init__(self, path: Path):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns of forks
        import tokenizers

        if not path.stat().st_size:
            raise ValueError(f"{path} is empty: download it again")
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # which the package raises, of no other class
            raise ValueError(f"{path} is no tokenizer.json: {error}") from error
        self._model.no_truncation()
        self._model.no_padding()
        self._added = self._model.get_added_tokens_decoder()
        self.vocab_size = max([self._model.get_vocab_size() - 1, *self._added]) + 1
        decoder = self._model.decoder
        spells_bytes = decoder is not None and b"ByteFallback" in decoder.__getstate__()
        names = [f"<0x{value:02X}>" for value in range(256)] if spells_bytes else []
        # Bytes that follow each other are decoded together: all U+FFFD if they are no characters.
        self.changing = {self._model.token_to_id(name) for name in names}

    def own_ids(self) -> tuple[int | None, list[int]]:
        ends = [self._model.token_to_id(name) for name in END_NAMES]
        return self.added_at_the_beginning(), [i for i in ends if i is not None][:1]

    def added_at_the_beginning(self) -> int | None:
        """Return the token that the file itself puts before a text; None where it puts none."""
        alone = self._model.encode("a", add_special_tokens=False).ids
        ids = self._model.encode("a", add_special_tokens=True).ids
        return ids[0] if ids[:1] != alone[:1] else None

    def name_of(self, token: int) -> str:
        return self._model.id_to_token(token) or ""

    def hide(self, own: set[int], ends: frozenset[int]) -> None:
        """Take these for special tokens too, of `ends` what is no piece of a text."""
        from tokenizers import AddedToken

        for token in own | (ends & self._added.keys()):
            if not (token in self._added and self._added[token].special):
                content = self._model.id_to_token(token) or ""  # adds nothing
                self._model.add_special_tokens([AddedToken(content, normalized=False)])
        self._added = self._model.get_added_tokens_decoder()
        self._hidden = {i for i, token in self._added.items() if token.special}
        self.names = frozenset(self._added[i].content for i in self._hidden)
        self.pattern = any_of(self.names)
        self._forbid_special_merges()

    def _forbid_special_merges(self) -> None:
        """Drop merges that make a special token out of text that names it."""
        self._model.encode_special_tokens = True
        if self._hidden.isdisjoint(i for name in self.names for i in self.encode(name, False)):
            return
        content = json.loads(self._model.to_str())
        merges = content["model"].get("merges", [])
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        content["model"]["merges"] = [
            pair for pair in pairs if not {"".join(pair), *pair} & self.names
        ]
        self._model = type(self._model).from_str(json.dumps(content))

    def encode(self, s: str, reads: bool) -> list[int]:
        self._model.encode_special_tokens = not reads
        return self._model.encode(s, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str], reads: bool) -> list[list[int]]:
        self._model.encode_special_tokens = not reads
        before = os.environ["TOKENIZERS_PARALLELISM"]
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        try:
            encoded = self._model.encode_batch_fast(texts, add_special_tokens=False)
        finally:
            os.environ["TOKENIZERS_PARALLELISM"] = before
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids. Special tokens have none."""
        ids = [int(i) for i in ids if i not in self._hidden]
        return self._model.decode(ids, skip_special_tokens=False)


# -------------------------------------------------------------------------------------------------
# What lies beside a tokenizer


def params_ids(folder: Path) -> tuple[int | None, list[int]] | None:
    """Return the tokens that begin and end a text, by a model's params.json; None without any."""
    path = folder / "params.json"
    params = read_json(path) if path.is_file() else {}
    return (params.get("bos_id"), params["eos_ids"]) if params.get("eos_ids") else None


def load_tokenizer(
    folder: str | Path,
    bos_id: int | None = None,
    eos_ids: Iterable[int] | None = None,
    special_tokens: bool = False,
) -> Tokenizer:
    """Return the tokenizer of a model's folder. Raises what `Tokenizer` does."""
    return Tokenizer(tokenizer_file(folder), bos_id, eos_ids, special_tokens)


def tokenizer_file(folder: str | Path) -> Path:
    """Return the tokenizer in a model's folder, or where it is missing."""
    paths = [Path(folder) / name for name in FILES]
    return next((path for path in paths if path.is_file()), paths[0])


# -------------------------------------------------------------------------------------------------
# A stream


def stream_text(
    ids: Iterator[int], tokenizer: Tokenizer, prompt_ids: list[int], every: int = 1
) -> Iterator[str]:
    """Decode ids as they arrive. The pieces, joined, are the text that all ids add to the prompt.

    Yields a piece every `every` ids. Holds back a character whose bytes are spread over ids until
    it is whole.
    """
    # Decode ids after some that are already shown: the first id of a text loses its space.
    context, new = list(prompt_ids), []
    shown = tokenizer.decode(context)
    count = 0
    while True:
        token = next(ids, None)
        if token is not None:
            new.append(token)
            count += 1
            if count % every or tokenizer.may_change(token):
                continue
        text = tokenizer.decode(context + new)
        if token is None or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            new_text = tokenizer.decode(new)
            if new_text.strip():
                context, new, shown = new, [], new_text
            else:  # nothing to see: too little context for what follows
                context, new, shown = context + new, [], text
        if token is None:
            return
