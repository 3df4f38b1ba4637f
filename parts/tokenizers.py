"""Text to token ids and back: the reader of SentencePiece models, and text as a stream."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from parts.files import check_content


class Tokenizer:
    """A SentencePiece model (Kudo and Richardson, 2018) from a `tokenizer.model` file.

    Raises FileNotFoundError or ValueError when the file is missing, is no SentencePiece model, or
    lacks the tokens that begin and end a text.
    """

    def __init__(self, model_path: str | Path):
        if not Path(model_path).is_file():
            raise FileNotFoundError(f"{model_path} is missing: convert the model with convert.py")
        check_content(model_path)
        try:
            self._model = SentencePieceProcessor(model_proto=Path(model_path).read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{model_path} is not a SentencePiece model: {error}") from error
        if min(self._model.bos_id(), self.eos_id) < 0:
            raise ValueError(f"{model_path} has no token for the beginning or the end of a text")

    @property
    def eos_id(self) -> int:
        """The id of the token that ends a text."""
        return self._model.eos_id()

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return self._model.vocab_size()

    def encode(self, s: str, eos: bool = False) -> list[int]:
        """Return the token ids of `s` after the token that begins a text; with `eos`, the token
        that ends one follows.
        """
        ids = [self._model.bos_id(), *self._model.encode(s)]
        return [*ids, self.eos_id] if eos else ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of the ids. The tokens that begin and end a text have none."""
        return self._model.decode(ids)


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
    for count in itertools.count(1):
        token = next(ids, None)
        if token is not None:
            new.append(token)
            if count % every:
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
