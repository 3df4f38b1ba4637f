"""The text that follows a prompt, as the flags of generation want it."""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from parts import device, run_log  # before MLX
from parts.cli import warn
from parts.decoder import Decoder, generate_step
from parts.flags import sampling_of
from parts.stop_text import until_stop
from parts.tokenizers import Tokenizer, stream_text

import mlx.core as mx
import mlx.nn as nn


@contextmanager
def ready_to_answer() -> Iterator[None]:
    """Meanwhile, the device is set for one token at a time, also after a training."""
    device.open_streams(1)  # all cores for one product
    mx.reset_peak_memory()
    with device.wired():
        yield


class Answer:
    """The text that follows a prompt, piece by piece; one may be read once.

    `ids` are the tokens that were computed so far, with that which ended the text. It ends at one
    of `end_ids`, by default those of the tokenizer, before `--stop` or one of `stops`, after
    `--num-tokens`, or when `stopping()`. decoder: see `generate_step`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        prompt_ids: list[int],
        args: argparse.Namespace,
        end_ids: frozenset[int] | None = None,
        stops: tuple[str, ...] = (),
        decoder: Decoder | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ):
        self.ids: list[int] = []
        self._n_prompt_tokens = len(prompt_ids) - (decoder.offset if decoder is not None else 0)
        self._times = [time.perf_counter()]  # of the start, and of each token
        if decoder is None and args.max_kv_size is not None:
            decoder = Decoder(model, max_kv_size=args.max_kv_size)
        ends = tokenizer.eos_ids if end_ids is None else end_ids
        ids = generate_step(model, prompt_ids, sampling_of(args), tokenizer.vocab_size, decoder)
        ids = self._recorded(itertools.islice(ids, args.num_tokens))
        ids = itertools.takewhile(lambda token: token not in ends and not stopping(), ids)
        pieces = stream_text(ids, tokenizer, prompt_ids, args.write_every)
        self._pieces = until_stop(pieces, [*args.stop, *stops])

    def _recorded(self, ids: Iterator[int]) -> Iterator[int]:
        for token in ids:
            self._times.append(time.perf_counter())
            self.ids.append(token)
            yield token

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def summary(self) -> str:
        """Return how fast that was, and the peak memory; nothing without any token. Of the prompt,
        the tokens count that were computed.
        """
        if not self.ids:
            return ""
        return run_log.generation_summary(self._n_prompt_tokens, self._times)


def warn_of_length(n_tokens: int, model: nn.Module) -> None:
    """Warn of a prompt that is longer than the texts that the model was trained on."""
    context = model.args.max_position_embeddings
    if context is not None and n_tokens > context:
        warn(
            f"the prompt has {n_tokens} tokens, and the model was made for at most {context}: the "
            "answer may make no sense"
        )
