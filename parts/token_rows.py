"""Records to rows of token ids, in which is written what counts in the loss.

A token that does not count is stored as the complement of its id, ~id, which is negative: so a row
is one array, whatever truncates or joins it. `batches.pad_batch` makes inputs and targets of both.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from parts.chat import TRAINING_DAY, ChatTemplate, answer_spans, load_template
from parts.cli import warn
from parts.records import Chat, Completion, Record, Records
from parts.token_cache import BAR_DELAY, BLOCK, TokenWriter
from parts.tokenizers import Tokenizer

BATCH = 1 << 20  # characters that are encoded at once, on all cores
NEVER = 1 << 62  # beyond every row


class Naming(NamedTuple):
    """How many texts name special tokens that are read as text; a first name, and its place."""

    n: int
    name: str
    place: str


@dataclass(frozen=True)
class TokenRows:
    """The token ids of each of n texts, int32. The arrays of all rows are parts of `tokens`."""

    tokens: np.ndarray  # (N,), in memory or in a file
    starts: np.ndarray  # (n,)
    lengths: np.ndarray  # (n,)
    first_counts: np.ndarray  # (n,), a row's first target that counts; NEVER where none does
    masked: bool  # whether there are tokens that do not count
    named: Naming | None = None  # special tokens in texts; None where there are none

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> np.ndarray:
        start = self.starts[index]
        return self.tokens[start : start + self.lengths[index]]

    def truncated(self, max_length: int) -> "TokenRows":
        """Return the first `max_length` tokens of each row."""
        return replace(self, lengths=np.minimum(self.lengths, max_length))

    def chosen(self, which: np.ndarray) -> "TokenRows":
        """Return some of the rows, by their indices."""
        names = "starts", "lengths", "first_counts"
        return replace(self, **{name: getattr(self, name)[which] for name in names})

    def where_counting(self) -> np.ndarray:
        """Return the indices of the rows in which a target counts."""
        return np.flatnonzero(self.first_counts < self.lengths)

    def digest(self) -> str:
        """Return a digest of all token ids, of each row."""
        sha = hashlib.sha256(np.ascontiguousarray(self.lengths))
        for start in range(0, len(self.tokens), BLOCK):
            sha.update(self.tokens[start : start + BLOCK])
        return sha.hexdigest()


class Source(NamedTuple):
    """The text of a record, and what of it does not count: a prompt that it begins with, or all but
    the characters (start, end) of answers.
    """

    text: str
    prompt: str | None = None
    answers: list[tuple[int, int]] | None = None


def encode_records(
    records: Records, tokenizer: Tokenizer, mask_prompt: bool, chat_template: str | None
) -> TokenRows:
    """Return a row for each record. mask_prompt: whether completions and answers alone count.
    chat_template: see `load_template`. Raises ValueError, which names file and line.
    """
    template, masked = None, mask_prompt and records.kind != "text"
    if records.kind == "chat":
        template = template_of(records, tokenizer, chat_template)
    elif chat_template is not None:
        warn(f"--chat-template is for chats, and {records.path} holds none: it is not used there")
    if not records.is_large:
        return encode_all(records, tokenizer, masked, template, "")
    key = [tokenizer.digest(), masked, template and template.digest]
    saved = saved_rows(records, tokenizer, key)
    return saved or encode_all(records, tokenizer, masked, template, key)


def template_of(records: Records, tokenizer: Tokenizer, chat_template: str | None) -> ChatTemplate:
    """Return the template of a file of chats. Raises ValueError or FileNotFoundError."""
    try:
        return load_template(chat_template, tokenizer.path.parent, tokenizer, TRAINING_DAY)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{records.path} holds chats: {error}") from error


def try_template(
    records: Records, tokenizer: Tokenizer, mask_prompt: bool, chat_template: str | None
) -> None:
    """Raise what `encode_records` would for the first record, if it is a chat."""
    if records.kind == "chat":
        template = template_of(records, tokenizer, chat_template)
        find_source(records, 0, tokenizer, mask_prompt, template)


def saved_rows(records: Records, tokenizer: Tokenizer, key: list) -> TokenRows | None:
    """Return the rows that are kept next to a file; None where there are none of this key."""
    if records.saved is None or records.saved.about.get("key") != key:
        return None
    about, arrays = records.saved
    tokens, lengths = arrays["tokens"], arrays["lengths"]
    if not -tokenizer.vocab_size <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
        return None
    n, name, i = about["named"]
    named = Naming(n, name, records.place(i)) if n else None
    starts = np.cumsum(lengths) - lengths
    return TokenRows(tokens, starts, lengths, arrays["first_counts"], about["masked"], named)


def encode_all(
    records: Records,
    tokenizer: Tokenizer,
    masked: bool,
    template: ChatTemplate | None,
    key: list | None,
) -> TokenRows:
    """Return a row for each record, and keep those of a large file under `key`. masked: whether
    there are tokens that do not count.
    """
    n = len(records)
    lengths, first_counts = np.zeros(n, np.int64), np.zeros(n, np.int64)
    n_named, name, first_named = 0, "", 0
    bar = tqdm(None, f"Tokenizing {records.path}", n, leave=False, delay=BAR_DELAY, disable=None)
    with bar, TokenWriter(records.path, records.as_read) as writer:
        for first, sources in batches_of_sources(records, tokenizer, masked, template):
            # Encode some, on all cores.
            rows = encode_batch(sources, tokenizer, is_chat=template is not None)
            for i, (source, row) in enumerate(zip(sources, rows, strict=True), start=first):
                if len(row) < 2:  # of a tokenizer without BOS
                    raise ValueError(f"{records.place(i)} is one token: leave it out")
                # Note how long each is, and where it begins to count.
                counts = row[1:] >= 0
                lengths[i] = len(row)
                first_counts[i] = 1 + counts.argmax() if counts.any() else NEVER
                # Note where special tokens are named.
                found = None
                if template is None and not tokenizer.special_tokens:
                    found = tokenizer.find_special(source.text)
                if found:
                    name, first_named = (name, first_named) if n_named else (found, i)
                    n_named += 1
                writer.add(row)
            bar.update(len(rows))
        about = {"kind": records.kind, "key": key, "masked": masked}
        about["named"] = n_named, name, first_named
        index = {"starts": np.array(records.starts), "lines": np.array(records.lines)}
        index.update(lengths=lengths, first_counts=first_counts)
        tokens = writer.finish(about, index)
    named = Naming(n_named, name, records.place(first_named)) if n_named else None
    return TokenRows(tokens, np.cumsum(lengths) - lengths, lengths, first_counts, masked, named)


def batches_of_sources(
    records: Records, tokenizer: Tokenizer, masked: bool, template: ChatTemplate | None
) -> Iterator[tuple[int, list[Source]]]:
    """Yield the index of the first of some records, and the source of each of these."""
    first, sources, size = 0, [], 0
    for i in range(len(records)):
        sources.append(find_source(records, i, tokenizer, masked, template))
        size += len(sources[-1].text)
        if size >= BATCH or i == len(records) - 1:
            yield first, sources
            first, sources, size = i + 1, [], 0


def find_source(
    records: Records, i: int, tokenizer: Tokenizer, masked: bool, template: ChatTemplate | None
) -> Source:
    """Return what is encoded of a file's record i. Raises ValueError, which names file and line."""
    try:
        return source_of(records[i], tokenizer, masked, template)
    except ValueError as error:
        where = "" if str(error).startswith(str(records.path)) else f"{records.place(i)}: "
        raise ValueError(f"{where}{error}") from error


def source_of(
    record: Record, tokenizer: Tokenizer, masked: bool, template: ChatTemplate | None
) -> Source:
    """Return what is encoded of a record. Raises ValueError where a template fails."""
    if isinstance(record, Completion):
        return Source("".join(record), record.prompt if masked else None)
    if not isinstance(record, Chat):
        return Source(record)
    if not masked:
        return Source(template.render(record).text)
    text, answers = answer_spans(template, record, tokenizer.special_names)
    return Source(text, answers=answers)


def encode_batch(sources: list[Source], tokenizer: Tokenizer, is_chat: bool) -> list[np.ndarray]:
    """Return the row of each: a text ends with EOS, and a chat as its template ends it.

    The tokens of a prompt are those that it has alone, as TRL counts them. Of a chat, a token
    counts if it holds a character of an answer.
    """
    options = {"bos": False, "special_tokens": True} if is_chat else {"eos": True}
    texts = [source.text for source in sources]
    rows = [np.array(ids, np.int32) for ids in tokenizer.encode_batch(texts, **options)]
    prompts = [source.prompt for source in sources if source.prompt is not None]
    n_masked = iter([len(ids) for ids in tokenizer.encode_batch(prompts)])
    for row, source in zip(rows, sources, strict=True):
        if source.prompt is not None:
            n = next(n_masked)
            row[:n] = ~row[:n]
        if source.answers is not None:
            mask_all_but(source.answers, row, source.text, tokenizer)
    return rows


def mask_all_but(
    answers: list[tuple[int, int]], row: np.ndarray, text: str, tokenizer: Tokenizer
) -> None:
    """Mask a chat's row but for the tokens of its answers, which are characters of the text.

    How many tokens come before a character is what the text before it has alone, as far as it has
    the same; from a special token on, since what comes before one has no part in what follows.
    """
    whole = row.copy()
    row[:] = ~row
    begin, first = 0, 0  # of a special token that is known: its character, its place in the row
    for answer in answers:
        bounds = []
        for at in answer:
            ids = tokenizer.encode(text[begin:at], bos=False, special_tokens=True)
            n_same, is_same = common_beginning(whole[first:], np.array(ids, np.int32))
            bounds.append(first + n_same)
            if is_same and n_same:
                name = tokenizer.name_of(int(whole[bounds[-1] - 1]))
                if name in tokenizer.special_names and text.endswith(name, begin, at):
                    begin, first = at - len(name), bounds[-1] - 1
        start, end = bounds
        end += not is_same and answer[0] < answer[1]  # a token that ends after the answer
        row[start:end] = whole[start:end]


def common_beginning(row: np.ndarray, other: np.ndarray) -> tuple[int, bool]:
    """Return how many tokens both begin with, and whether that is all of `other`."""
    n = min(len(row), len(other))
    differs = np.flatnonzero(row[:n] != other[:n])
    n_same = int(differs[0]) if len(differs) else n
    return n_same, n_same == len(other)


def special_token_warning(
    texts: Iterable[tuple[str, str]], tokenizer: Tokenizer, in_data: Iterable[Naming] = ()
) -> str | None:
    """Return what to warn of where texts name special tokens that are read as text; None else.

    texts: each with the place where it stands, such as "--prompt". in_data: what was found there.
    """
    names = [(tokenizer.find_special(text), place) for text, place in texts]
    found = [Naming(1, name, place) for name, place in names if name]
    found += in_data
    if tokenizer.special_tokens or not found:
        return None
    n = sum(naming.n for naming in found)
    count = f"{n} texts name" if n > 1 else "a text names"
    return (
        f"{count} special tokens, such as {found[0].name} ({found[0].place}), which are read as "
        "text: --special-tokens reads them as tokens"
    )
