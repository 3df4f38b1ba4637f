"""Answer the prompts of a file, many at once, to standard output: one JSON object a line."""

import argparse
import json
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

from tqdm import tqdm

from parts import device  # before MLX, for its BLAS
from parts.answers import ready_to_answer, warn_of_length
from parts.chat import ChatTemplate, end_of_turn
from parts.cli import warn
from parts.continuous_batching import generate_rows
from parts.decoder_batch import bytes_of_row
from parts.flags import sampling_of
from parts.prompt_file import Prompt, answered
from parts.records import Chat
from parts.stop_text import until_stop
from parts.token_rows import special_token_warning
from parts.tokenizers import Tokenizer, stream_text

import mlx.nn as nn
from mlx.utils import tree_flatten

MAX_ROWS = 64  # that are answered together, where --batch-size does not say
STOP_SLACK = 8  # tokens looked at for a stop text, besides as many as it has bytes


class AnswerRow:
    """The tokens of a prompt, and those that follow: up to `n_tokens`, or one of `ends`, or where
    the text has one of `stops`.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        tokenizer: Tokenizer,
        n_tokens: int,
        ends: Collection[int],
        stops: Sequence[str] = (),
    ):
        self.prompt_ids, self.ids = prompt_ids, []
        self.reason = "length"  # why it has ended; or "stop"
        self._tokenizer, self._n_tokens, self._ends, self._stops = tokenizer, n_tokens, ends, stops
        self._n_tail = max((len(stop.encode()) for stop in stops), default=0) + STOP_SLACK

    def left(self) -> int:
        """Return how many more tokens it takes at most."""
        return self._n_tokens - len(self.ids)

    def add(self, token: int) -> bool:
        """Take the next token. Return whether the answer has ended."""
        if token in self._ends:
            self.reason = "stop"
            return True
        self.ids.append(token)
        if self._may_hold_a_stop() and len(self.text()) < len("".join(self._pieces())):
            self.reason = "stop"
            return True
        return not self.left()

    def text(self) -> str:
        """Return what the tokens add to the prompt, up to where the first stop text begins."""
        return "".join(until_stop(self._pieces(), self._stops))

    def _pieces(self) -> Iterator[str]:
        return stream_text(iter(self.ids), self._tokenizer, self.prompt_ids, len(self.ids) + 1)

    def _may_hold_a_stop(self) -> bool:
        if not self._stops:
            return False
        tail = self._tokenizer.decode(self.ids[-self._n_tail :])
        return any(stop in tail for stop in self._stops)


@contextmanager
def answers_alone(args: argparse.Namespace) -> Iterator[None]:
    """Where there are prompts, have standard output for the answers: all that is printed meanwhile
    goes to standard error, but for what `write` does.
    """
    if args.prompts is None:
        yield
        return
    args.output = sys.stdout
    with redirect_stdout(sys.stderr):
        yield


def answer_prompts(
    model: nn.Module,
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    template: ChatTemplate | None = None,
) -> None:
    """Write an answer to each of `args.prompts` to standard output, in their order and as soon as
    that allows, and how fast that was to standard error. template: of chats, where there are any.
    """
    rows = make_rows(args.prompts, tokenizer, args, template)
    longest = max(len(row.prompt_ids) for row in rows)
    warn_of_length(longest, model)
    n_together = args.rows or rows_that_fit(model, longest + args.num_tokens)
    ended, n_written, start = set(), 0, time.perf_counter()
    with ready_to_answer():
        answers = generate_rows(model, rows, n_together, sampling_of(args), tokenizer.vocab_size)
        for row in tqdm(answers, "Answering", len(rows), leave=False, disable=None):
            ended.add(row)
            while n_written < len(rows) and rows[n_written] in ended:
                write(args.output, args.prompts[n_written], rows[n_written])
                n_written += 1
    seconds = time.perf_counter() - start
    n_asked, n_made = sum(len(row.prompt_ids) for row in rows), sum(len(row.ids) for row in rows)
    print(
        f"{len(rows)} prompts: {n_asked} tokens; generation: {n_made} tokens, "
        f"{n_made / seconds:.3f} tokens/sec; peak memory {device.peak_memory() / 1e9:.3f} GB",
        file=sys.stderr,
    )


def write(output: TextIO, prompt: Prompt, answer: AnswerRow) -> None:
    """Print the line of an answer."""
    is_unicode = (output.encoding or "").lower().startswith("utf")
    record = answered(prompt, answer.text(), answer.reason)
    tqdm.write(json.dumps(record, ensure_ascii=not is_unicode), file=output)  # past the bar
    output.flush()


def rows_that_fit(model: nn.Module, length: int) -> int:
    """Return how many texts of so many tokens are answered together: as many as `MAX_ROWS`, whose
    keys and values take no more memory than the weights.
    """
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    return max(1, min(MAX_ROWS, weights // bytes_of_row(model, length)))


def make_rows(
    prompts: list[Prompt],
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    template: ChatTemplate | None,
) -> list[AnswerRow]:
    """Return the row of each prompt; with `--chat`, a text is a user's message. Raises ValueError,
    which names file and line.
    """
    rows, ends, stops = [], tokenizer.eos_ids, args.stop
    if template is not None:
        turn_ends, turn_stops = end_of_turn(template, tokenizer)
        ends, stops = ends | turn_ends, [*stops, *turn_stops]
    for prompt in prompts:
        content = prompt.content
        if args.chat and not isinstance(content, Chat):
            content = Chat([{"role": "user", "content": content}], None)
        try:
            ids = prompt_ids(content, tokenizer, template)
        except ValueError as error:
            raise ValueError(f"{prompt.place}: {error}") from error
        if not ids:
            raise ValueError(f"{prompt.place} is empty, and no token begins this model's texts")
        rows.append(AnswerRow(ids, tokenizer, args.num_tokens, ends, stops))
    texts = [
        (p.content, p.place) for p in prompts if not (args.chat or isinstance(p.content, Chat))
    ]
    warning = special_token_warning(texts, tokenizer)
    if warning:
        warn(warning)
    return rows


def prompt_ids(
    content: str | Chat, tokenizer: Tokenizer, template: ChatTemplate | None
) -> list[int]:
    """Return the token ids of a text, or of a chat up to where its answer begins."""
    if not isinstance(content, Chat):
        return tokenizer.encode(content)
    text = template.render(content, add_generation_prompt=True).text
    return tokenizer.encode(text, bos=False, special_tokens=True)
