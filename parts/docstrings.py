"""A docstring made fit to learn from: its markup shown, noise left out, truncated between sections.

Knows the sections of numpydoc (underlined headings), of Google's style (`Args:`) and of Sphinx's
fields (`:param x:`).
"""

import math
import re
import unicodedata
from itertools import groupby
from typing import NamedTuple

from parts.markup import indent_of, visible_text

# -------------------------------------------------------------------------------------------------
# Noise

# A whole docstring that says nothing, or nothing of the object.
NOISE = re.compile(
    r"alias for field number \d+"
    r"|\W*(todo|tbd|fixme|wip|undocumented|docstring|none|placeholder|overloaded function)?\W*"
    r"|(no|missing|todo:? (add|write)) (doc(string|umentation|s)?)( (available|yet|provided))*\W*"
    r"|(see|inherited from|inherit(s|ed)?( docs?)?( from)?|overrid(es|den)?( from)?) "
    r"(the )?(base|parent|super) ?class('s)?( (docs?|docstring|documentation|method))?( for .*)?\W*"
    r"|\{?@?inheritdoc\}?",
    re.IGNORECASE | re.DOTALL,
)
LICENCE = re.compile(
    r"copyright\W+(\(c\)|©|\d|by\b|the\b)|^:?licen[cs]e:|all rights reserved|spdx-license-identifier"
    r"|licensed under|permission is hereby granted|redistribution and use in source"
    r"|without warrant|\"as is\"|permission notice shall be|^the (mit|bsd|apache)\b.* licen[cs]e"
    r"|^(mit|bsd|apache)\b.{0,20} licen[cs]e|^:?authors?:|terms of the",
    re.IGNORECASE,
)
# Placeholders that stand alone on their line, as decorators fill them in; and one inside a text.
PLACEHOLDER_LINE = re.compile(r"^[ \t]*(%\([\w:]+\)s|\{_?[a-z]\w*\}|\$\{\w+\})[ \t]*$", re.MULTILINE)
PLACEHOLDER = re.compile(r"%\([a-z]\w*\)s")
CALL = re.compile(r"(\d+\. )?([\w.]+|[\w.]+\[[\w, ]*\])?\(")


def is_noise(docstring: str) -> bool:
    """Whether nothing worth learning stands in a docstring.

    So with a signature alone, a licence alone, a template whose text was never filled in, what
    named tuples say of their fields, and words such as "TODO".
    """
    text = docstring.strip()
    if NOISE.fullmatch(text[:200]) and len(text) <= 200:
        return True
    return is_signature(text) or is_licence(text) or is_template(text)


def is_signature(text: str) -> bool:
    """Whether a text is one or more signatures, each `name(…)` or `name(…) -> type`."""
    rest = text.replace("Overloaded function.", "").strip()
    while rest:
        call = CALL.match(rest)
        end = closing_bracket(rest, call.end()) if call else None
        if not end:
            return False
        returned = re.match(r"[ \t]*(->|→)[ \t]*[^\n]{1,300}|[ \t]*:?(?=\s|$)", rest[end:])
        if not returned:
            return False
        line_ends = end + returned.end()
        if rest[line_ends : line_ends + 1].strip():
            return False
        rest = rest[line_ends:].lstrip("\n").lstrip()
    return bool(text)


def closing_bracket(text: str, start: int) -> int | None:
    """The place after the bracket that closes the one before `start`, within 3000 characters."""
    depth = 1
    for at in range(start, min(start + 3000, len(text))):
        depth += (text[at] in "([{") - (text[at] in ")]}")
        if not depth:
            return at + 1
    return None


def is_licence(text: str) -> bool:
    """Whether every paragraph speaks of a licence or of its authors."""
    if not LICENCE.search(text[:20_000]):
        return False
    return all(LICENCE.search(paragraph) for paragraph in text[:20_000].split("\n\n"))


def is_template(text: str) -> bool:
    """Whether placeholders are all that a text has, or stand in its summary."""
    rest = PLACEHOLDER_LINE.sub("", text).strip()
    summary = rest.split("\n\n", 1)[0]
    return not rest or PLACEHOLDER.search(summary) is not None and "``" not in summary
