"""A conversation with a model, in its chat template; the cache is kept from turn to turn."""

import argparse
from collections.abc import Callable, Iterator

import numpy as np

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts.answers import Answer, warn_of_length
from parts.chat import ChatTemplate, encode_prompt, end_of_turn
from parts.decoder import Decoder
from parts.records import Chat
from parts.token_rows import common_beginning
from parts.tokenizers import Tokenizer

import mlx.nn as nn


class Conversation:
    """What a user and a model have said so far: `messages`, as templates take them.

    args: the flags of generation. Raises ValueError where the template does not work.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        args: argparse.Namespace,
    ):
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._args = args
        self._ends, self._stops = end_of_turn(template, tokenizer)
        self._decoder = Decoder(model, max_kv_size=args.max_kv_size)
        self._ids: list[int] = []  # whose keys and values the decoder's caches hold
        self.messages: list[dict] = []
        self.summary = ""  # of the last answer

    def ask(self, content: str, stopping: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Yield the answer to a message, piece by piece. What was said of it is part of the
        conversation when it ends, by itself or when `stopping()`; without a word, the question is
        not, either.

        Raises ValueError where the template refuses the message.
        """
        asked = [*self.messages, {"role": "user", "content": content}]
        ids = encode_prompt(self._template, self._tokenizer, asked)
        warn_of_length(len(ids), self._model)
        # Keep what the caches hold of it, but for the last token, whose logits are needed.
        n_known, _ = common_beginning(np.array(self._ids), np.array(ids[:-1]))
        known, self._ids = self._ids, []  # until all is done: an error may leave anything
        if known:
            self._decoder.trim(n_known)
        else:
            self._decoder.start()
        ends = self._tokenizer.eos_ids | self._ends
        answer = Answer(
            self._model,
            self._tokenizer,
            ids,
            self._args,
            ends,
            self._stops,
            self._decoder,
            stopping,
        )
        pieces = []
        for piece in answer:
            pieces.append(piece)
            yield piece
        self._ids = [*ids, *answer.ids][: self._decoder.offset]
        text = "".join(pieces)
        if text or not stopping():
            self.messages = [*asked, {"role": "assistant", "content": text}]
        self.summary = answer.summary()

    def reset(self) -> None:
        """Forget all that was said, but for what the system did."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def set_system(self, content: str) -> None:
        """Put a message of the system before all others, in place of one that is there; nothing
        takes it away. Raises ValueError where the template has no place for it.
        """
        system = [{"role": "system", "content": content}] if content else []
        self._template.render(Chat([*system, {"role": "user", "content": "Hello"}], None), True)
        self.messages = system + [m for m in self.messages if m["role"] != "system"]
