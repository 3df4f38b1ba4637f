"""Records to rows of token ids, in which is written what counts in the loss.

A token that does not count is stored as the complement of its id, ~id, which is negative: so a row
is one array, whatever truncates or joins it. `batches.pad_batch` makes inputs and targets of both.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from parts.chat import ChatTemplate, answer_spans, load_template
from parts.records import BAR_DELAY, Chat, Completion, Record, Records
from parts.tokenizers import Tokenizer

IN_MEMORY = 1 << 26  # tokens, of 4 bytes; more are in a temporary file


@dataclass(frozen=True)
class TokenRows:
    """The token ids of each of n texts, int32. The arrays of all rows are parts of `tokens`."""

    tokens: np.ndarray  # (N,), in memory or in a file
    starts: np.ndarray  # (n,)
    lengths: np.ndarray  # (n,)
    first_counts: np.ndarray  # (n,), a row's first target that counts; beyond it where none does
    masked: bool  # whether there are tokens that do not count

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
        chosen = [array[which] for array in (self.starts, self.lengths, self.first_counts)]
        return TokenRows(self.tokens, *chosen, self.masked)

    def where_counting(self) -> np.ndarray:
        """Return the indices of the rows in which a target counts."""
        return np.flatnonzero(self.first_counts < self.lengths)


def encode_records(
    records: Records, tokenizer: Tokenizer, mask_prompt: bool, chat_template: str | None
) -> TokenRows:
    """Return a row for each record. mask_prompt: whether completions and answers alone count.
    chat_template: see `load_template`. Raises ValueError, which names file and line.
    """
    template = None
    if records.kind == "chat":
        try:
            template = load_template(chat_template, tokenizer.path.parent, tokenizer)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{records.path} holds chats: {error}") from error
    lengths, firsts = np.zeros(len(records), np.int64), np.zeros(len(records), np.int64)
    bar = {"leave": False, "delay": BAR_DELAY, "disable": None}

    def encoded() -> Iterator[np.ndarray]:
        for i in tqdm(range(len(records)), f"Tokenizing {records.path}", **bar):
            try:
                row = encode_record(records[i], tokenizer, mask_prompt, template)
            except ValueError as error:
                raise ValueError(f"{records.place(i)}: {error}") from error
            if len(row) < 2:  # of a tokenizer without BOS
                raise ValueError(f"{records.place(i)} is one token: leave it out")
            lengths[i] = len(row)
            counts = row[1:] >= 0
            firsts[i] = 1 + counts.argmax() if counts.any() else len(row)
            yield row

    tokens = join(encoded())
    starts = np.cumsum(lengths) - lengths
    masked = mask_prompt and records.kind != "text"
    return TokenRows(tokens, starts, lengths, np.where(firsts < lengths, firsts, 1 << 62), masked)


def join(rows: Iterable[np.ndarray]) -> np.ndarray:
    """Return the rows in one array. Where they are many, it lies in a temporary file."""
    file, waiting, n_waiting = None, [np.zeros(0, np.int32)], 0
    for row in rows:
        waiting.append(row)
        n_waiting += len(row)
        if n_waiting >= IN_MEMORY:
            file = file or tempfile.TemporaryFile()  # noqa: SIM115  as long as the array
            np.concatenate(waiting).tofile(file)
            waiting, n_waiting = [], 0
    if file is None:
        return np.concatenate(waiting)
    if waiting:
        np.concatenate(waiting).tofile(file)
    return np.memmap(file, np.int32, mode="r")


def encode_record(
    record: Record, tokenizer: Tokenizer, mask_prompt: bool, template: ChatTemplate | None
) -> np.ndarray:
    """Return the row of a record: a text ends with EOS, and a chat as its template ends it.

    The tokens of a prompt are those that it has alone, as TRL counts them.
    """
    if isinstance(record, Chat):
        return encode_chat(record, tokenizer, mask_prompt, template)
    text = "".join(record) if isinstance(record, Completion) else record
    row = np.array(tokenizer.encode(text, eos=True), np.int32)
    if mask_prompt and isinstance(record, Completion):
        n = len(tokenizer.encode(record.prompt))
        row[:n] = ~row[:n]
    return row


def encode_chat(
    chat: Chat, tokenizer: Tokenizer, mask_prompt: bool, template: ChatTemplate
) -> np.ndarray:
    """Return the row of a chat. With `mask_prompt`, a token counts if it holds a character of an
    answer.
    """

    def encode(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text, bos=False, special_tokens=True), np.int32)

    if not mask_prompt:
        return encode(template.render(chat).text)
    text, spans = answer_spans(template, chat, tokenizer.special_names)
    row = encode(text)
    masked = ~row
    for start, end in spans:
        first, _ = common_beginning(row, encode(text[:start]))
        last, is_whole = common_beginning(row, encode(text[:end]))
        last += not is_whole and start < end  # a token that ends after the answer
        masked[first:last] = row[first:last]
    return masked


def common_beginning(row: np.ndarray, other: np.ndarray) -> tuple[int, bool]:
    """Return how many tokens both begin with, and whether that is all of `other`."""
    n = min(len(row), len(other))
    differs = np.flatnonzero(row[:n] != other[:n])
    n_same = int(differs[0]) if len(differs) else n
    return n_same, n_same == len(other)


def text_of(record: Record) -> str:
    """Return the text of a record in which special tokens may be read as text: of a chat, none."""
    if isinstance(record, Chat):
        return ""
    return "".join(record) if isinstance(record, Completion) else record


def special_token_warning(texts: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> str | None:
    """Return what to warn of where texts name special tokens that are read as text; None else.

    texts: each with the place where it stands, such as "data/train.jsonl, line 3".
    """
    if tokenizer.special_tokens:
        return None
    found = [(name, place) for text, place in texts if (name := tokenizer.find_special(text))]
    if not found:
        return None
    name, place = found[0]
    count = f"{len(found)} texts name" if len(found) > 1 else "a text names"
    return (
        f"{count} special tokens, such as {name} ({place}), which are read as text: "
        "--special-tokens reads them as tokens"
    )
