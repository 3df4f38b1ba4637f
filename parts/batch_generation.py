"""Answer the prompts of a file, many at once, to standard output: one JSON object a line."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

from tqdm import tqdm

from parts import chat, device  # before MLX
from parts.continuous_batching import generate_rows
from parts.flags import sampling_of
from parts.prompt_file import Prompt, answered
from parts.records import Chat
from parts.stop_text import until_stop
from parts.tokenizers import Tokenizer, stream_text

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

MAX_ROWS = 64  # that are answered together, where --batch-size does not say
STOP_SLACK = 8  # tokens looked at for a stop text, besides as many as it has bytes


class AnswerRow:
    """The tokens of a prompt, and those that follow: up to `n_tokens`, or one that ends a text, or
    where the text has one of `stops`.
    """

    def __init__(
        self, prompt_ids: list[int], tokenizer: Tokenizer, n_tokens: int, stops: Sequence[str] = ()
    ):
        self.prompt_ids, self.ids = prompt_ids, []
        self.reason = "length"  # why it has ended; or "stop"
        self._tokenizer, self._n_tokens, self._stops = tokenizer, n_tokens, stops
        self._n_tail = max((len(stop.encode()) for stop in stops), default=0) + STOP_SLACK

    def left(self) -> int:
        """Return how many tokens it takes at most."""
        return self._n_tokens - len(self.ids)

    def add(self, token: int) -> bool:
        """Take the next token. Return whether the answer has ended."""
        if token in self._tokenizer.eos_ids:
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


def answer_prompts(model: nn.Module, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Write an answer to each of `args.prompts` to standard output, in their order and as soon as
    that allows, and how fast that was to standard error.
    """
    device.open_streams(1)  # after training, all cores for one product again
    mx.reset_peak_memory()
    rows = encode_prompts(args.prompts, tokenizer, getattr(args, "chat", False), args.chat_template)
    answers = [AnswerRow(ids, tokenizer, args.num_tokens, args.stop) for ids in rows]
    n_rows = getattr(args, "rows", None) or rows_that_fit(
        model, max(map(len, rows)) + args.num_tokens
    )
    done, n_written, start = set(), 0, time.perf_counter()
    ended = generate_rows(model, answers, n_rows, sampling_of(args), tokenizer.vocab_size)
    bar = tqdm(ended, "Answering", len(answers), leave=False, disable=None)
    with device.wired():
        for answer in bar:
            done.add(id(answer))
            while n_written < len(answers) and id(answers[n_written]) in done:
                write(args.output, args.prompts[n_written], answers[n_written])
                n_written += 1
    seconds = time.perf_counter() - start
    n_tokens = sum(len(answer.ids) for answer in answers)
    print(
        f"{len(answers)} prompts: {sum(map(len, rows))} tokens; generation: {n_tokens} tokens, "
        f"{n_tokens / seconds:.3f} tokens/sec; peak memory {mx.get_peak_memory() / 1e9:.3f} GB",
        file=sys.stderr,
    )


def write(output: TextIO, prompt: Prompt, answer: AnswerRow) -> None:
    """Print the line of an answer."""
    is_unicode = (output.encoding or "").lower().startswith("utf")
    record = answered(prompt, answer.text(), answer.reason)
    print(json.dumps(record, ensure_ascii=not is_unicode), file=output, flush=True)


def rows_that_fit(model: nn.Module, length: int) -> int:
    """Return how many texts of so many tokens are answered together: as many as `MAX_ROWS`, whose
    keys and values take no more memory than the weights.
    """
    args = model.args
    n_values = 2 * args.n_layers * args.n_kv_heads * args.head_dim * length
    n_bytes = n_values * model.norm.weight.dtype.size
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    return max(1, min(MAX_ROWS, weights // n_bytes))


def encode_prompts(
    prompts: list[Prompt], tokenizer: Tokenizer, as_chats: bool, template: str | None
) -> list[list[int]]:
    """Return the token ids of each prompt. as_chats: whether a text is a user's message. template:
    see `chat.load_template`. Raises ValueError, which names file and line.
    """
    renderer, rows = None, []
    for prompt in prompts:
        content = prompt.content
        if as_chats and not isinstance(content, Chat):
            content = Chat([{"role": "user", "content": content}], None)
        if isinstance(content, Chat):
            renderer = renderer or chat.load_template(template, tokenizer.path.parent, tokenizer)
            try:
                text = renderer.render(content, add_generation_prompt=True).text
            except ValueError as error:
                raise ValueError(f"{prompt.place}: {error}") from error
            ids = tokenizer.encode(text, bos=False, special_tokens=True)
        else:
            ids = tokenizer.encode(content)
        if not ids:
            raise ValueError(f"{prompt.place} is empty, and no token begins this model's texts")
        rows.append(ids)
    return rows
