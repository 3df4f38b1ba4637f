"""A stream of text that ends before the first of some stop texts."""

from collections.abc import Iterable, Iterator


def until_stop(pieces: Iterable[str], stops: list[str]) -> Iterator[str]:
    """Yield the pieces of a text up to where the first of `stops` begins: that which ends first, of
    two that end together the longer one.

    A stop text may be spread over pieces: what could be the beginning of one waits until it is
    clear that it is not. No more pieces are taken than it needs to find one.
    """
    text = ""  # not yielded yet
    for piece in pieces:
        text += piece
        places = [(text.find(stop), len(stop)) for stop in stops]
        found = [(start + length, start) for start, length in places if start >= 0]
        if found:
            yield text[: min(found)[1]]
            return
        n_held = max((n_possible(text, stop) for stop in stops), default=0)
        shown, text = text[: len(text) - n_held], text[len(text) - n_held :]
        yield shown
    yield text


def n_possible(text: str, stop: str) -> int:
    """How many characters at the text's end may yet become the stop text."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
