"""Tokens that are added to a tokenizer, which are found in a text before all others."""

import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from parts.files import read_json

BESIDE = ("added_tokens.json", "tokenizer_config.json")  # what may lie beside a tokenizer.model
NOTHING = re.compile(r"(?!)")


class AddedToken(NamedTuple):
    """A token that is found in a text before the others: its text, its id, whether it is special,
    whether it takes the white space at its left or right with it, and whether it is only found
    between characters that are no letters or digits.
    """

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


def any_of(names: Iterable[str]) -> re.Pattern:
    """Return the pattern that matches any of the names, the longest where several begin alike."""
    groups = groupby(sorted(names, reverse=True), lambda name: name[:3])  # Tekken has a thousand
    rests = {start: "|".join(re.escape(name[3:]) for name in group) for start, group in groups}
    found = "|".join(f"{re.escape(start)}(?:{rest})" for start, rest in rests.items())
    return re.compile(found) if found else NOTHING


def read_added_tokens(folder: Path) -> list[AddedToken]:
    """Return the tokens that added_tokens.json (their ids) and tokenizer_config.json (their flags,
    too) add to a SentencePiece model. Raises ValueError.
    """
    plain, config = (folder / name for name in BESIDE)
    try:
        ids = read_json(plain) if plain.is_file() else {}
        found = {int(i): AddedToken(name, int(i)) for name, i in ids.items()}
        flags = read_json(config).get("added_tokens_decoder") if config.is_file() else None
        for i, flag in (flags or {}).items():
            chosen = {name: bool(flag.get(name)) for name in AddedToken._fields[2:]}
            found[int(i)] = AddedToken(flag["content"], int(i), **chosen)
        if any(i < 0 or not isinstance(found[i].content, str) for i in found):
            raise ValueError("an id below 0, or a name that is no text")
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        names = " or ".join(str(path) for path in (plain, config) if path.is_file())
        raise ValueError(f"the added tokens in {names} are malformed: {error}") from error
    return [found[i] for i in sorted(found) if found[i].content]
