"""A docstring made fit to learn from: its markup shown, noise left out, truncated between sections.

Knows the sections of numpydoc (underlined headings), of Google's style (`Args:`) and of Sphinx's
fields (`:param x:`).
"""

import re
import textwrap
import unicodedata
from typing import NamedTuple

from parts.markup import indent_of, visible_text, with_margin

# -------------------------------------------------------------------------------------------------
# Noise

# A whole docstring that says nothing, or nothing of the object.
NOISE = re.compile(
    r"alias for field number \d+"
    r"|\W*(todo|tbd|fixme|wip|undocumented|docstring|none|placeholder|overloaded function"
    r"|deprecated|internal|private|not implemented( yet)?)?\W*"
    r"|(no|missing|todo:? (add|write)) (doc(string|umentation|s)?)( (available|yet|provided))*\W*"
    r"|(see|inherited from|inherit(s|ed)?( docs?)?( from)?|overrid(es|den)?( from)?) "
    r"(the )?(base|parent|super) ?class('s)?( (docs?|docstring|documentation|method))?"
    r"( for \w+)?\W*"
    r"|\{?@?inheritdoc\}?",
    re.IGNORECASE | re.DOTALL,
)
LICENCE = re.compile(
    r"copyright\W+(\(c\)|©|\d|by\b|the\b)|^:?licen[cs]e:|all rights reserved|spdx-license-"
    r"|licensed under|permission is hereby granted|redistribution and use in source"
    r"|^(the )?(mit|bsd|apache)\b.{0,20} licen[cs]e",
    re.IGNORECASE,
)
LICENCE_TERMS = re.compile(
    rf"{LICENCE.pattern}|without warrant|\"as is\"|permission notice shall|^:?authors?:|terms of",
    re.IGNORECASE,
)
PLACEHOLDER = re.compile(r"(?<!['\"`])%\([a-z]\w*\)s")
PLACEHOLDER_TYPE = re.compile(r"^(\w+ ?: ?|-{3,})%\(\w+\)s", re.MULTILINE)
CALL = re.compile(r"(\d+\. )?([\w.]+|[\w.]+\[[\w, ]*\])?\(")

NAME = r"[\w.*&'\"]+(?:\[[^\n]{0,300}\])?"
RETURNED = re.compile(
    rf"\s*(->|→)\s*({NAME}|[(\[{{][^\n]{{0,300}}[)\]}}])((\s*\||,| or)\s*{NAME}){{0,9}}[\s:.]*"
)


def is_noise(docstring: str) -> bool:
    """Whether nothing worth learning stands in a docstring.

    So with a signature alone, a licence alone, a template whose text was never filled in, what
    named tuples say of their fields, and words such as "TODO".
    """
    text = docstring.strip()
    return says_nothing(text) or is_signature(text) or is_licence(text) or is_template(text)


def says_nothing(text: str) -> bool:
    """Whether a text has no letter, only words such as "TODO", or only an enumeration's names."""
    if text.startswith("Members:") and all(map(str.isidentifier, text.split()[1:])):
        return True  # each of the members has it
    has_letter = any(map(str.isalpha, text))
    return not has_letter or len(text) < 200 and NOISE.fullmatch(text) is not None


def is_signature(text: str) -> bool:
    """Whether a text is one or more signatures, each `name(…)` or `name(…) -> type`."""
    rest = text.replace("Overloaded function.", "").strip()
    while rest:
        call = CALL.match(rest)
        end = closing_bracket(rest, call.end()) if call else None
        if not end:
            return False
        after, _, rest = rest[end:].partition("\n")
        if after.strip(" \t:") and not RETURNED.fullmatch(after):
            return False
        rest = rest.strip()
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
    """Whether a text begins with a licence, and all its paragraphs speak of it."""
    if not LICENCE.search(text.split("\n", 1)[0]):
        return False
    return all(map(LICENCE_TERMS.search, text[:20_000].split("\n\n")))


def is_template(text: str) -> bool:
    """Whether placeholders stand in the summary or for the parameters' types."""
    summary = text.split("\n\n", 1)[0]
    return bool(PLACEHOLDER.search(summary) or PLACEHOLDER_TYPE.search(text))


# -------------------------------------------------------------------------------------------------
# Truncating

UNDERLINE = re.compile(r"\s*([-=~^\"'#*+`.])\1{2,}")
DOCTEST_INPUT = re.compile(r"\s*(>>>|\.\.\.)( |$)")
# An item of a list, a field, an entry `name (type): text`.
ITEM = re.compile(
    r"\s*([-*+•] |\(?\w{1,2}[.)] |:\w[^:]{0,80}:( |$)|\*{0,2}\w+( or \w+)?( \([^()]{0,99}\))?: )"
)
RAISED = re.compile(r"\s*:(raises?|except|exception) [^\s:]{1,200}:")  # whole without a text
SENTENCE_END = re.compile(r"(?<![.\s(][a-z])(?<!\bcf)(?<!\bvs)(?<!\betc)[.!?][)\"'`]{0,2}(?=\s)")


def truncate(text: str, limit: int) -> str:
    """The text, or what of its beginning `limit` characters hold and ends well.

    That is, after a paragraph, an item or an example if more than half of the limit is kept so;
    else after a sentence or a line, else after a word or a character. A doctest line stays whole.
    """
    if len(text) <= limit:
        return text
    lines = text.split("\n")
    n_whole = whole_lines(lines, limit)
    in_doctest = DOCTEST_INPUT.match(lines[n_whole]) is not None
    least = 0 if in_doctest else limit / 2
    sentences = [match.end() for match in SENTENCE_END.finditer(text[: limit + 1])]
    for kept in (
        whole_blocks(lines, n_whole),
        text[: sentences[-1]] if sentences and not in_doctest else "",
        without_loose_end(lines, n_whole),
        "" if in_doctest else text[: limit + 1].rpartition(" ")[0].rstrip(),
    ):
        if len(kept) > least:
            return kept
    while limit and unicodedata.combining(text[limit]):
        limit -= 1
    return text[:limit]


def whole_lines(lines: list[str], limit: int) -> int:
    """How many lines `limit` characters hold."""
    size = -1
    for n, line in enumerate(lines):
        size += len(line) + 1
        if size > limit:
            return n
    return len(lines)


def whole_blocks(lines: list[str], n: int) -> str:
    """What of the first `n` lines is whole paragraphs, items and examples, with no loose end."""
    while n and not begins_block(lines, n):
        n -= 1
    return without_loose_end(lines, n)


def begins_block(lines: list[str], n: int) -> bool:
    """Whether a paragraph, an item of a list, an entry or an example ends before line `n`."""
    line, before = lines[n], lines[n - 1]
    if not line.strip() or not before.strip():
        return True
    if DOCTEST_INPUT.match(before) or line.lstrip().startswith("..."):
        return False
    if line.lstrip().startswith(">>>"):
        return True
    if is_output(lines, n):
        return False
    return ITEM.match(line) is not None or indent_of(line) < indent_of(before)


def is_output(lines: list[str], n: int) -> bool:
    """Whether line `n` is what a doctest prints, with 100 lines at most."""
    for at in range(n - 1, max(-1, n - 101), -1):
        before = lines[at].lstrip()
        if before.startswith(">>>"):
            return indent_of(lines[n]) >= indent_of(lines[at])
        if not before:
            break
    return False


def without_loose_end(lines: list[str], n: int) -> str:
    """The first `n` lines without an end that promises more.

    Such are a heading, a parameter without its meaning, a doctest's input without its output, and
    what ends on a colon.
    """
    while n:
        last = lines[n - 1]
        if not last.strip() or DOCTEST_INPUT.match(last) or opens(lines, n - 1):
            n -= 1
        elif last.endswith(":") and not RAISED.fullmatch(last):
            start = n - 1
            while start and not begins_block(lines, start):
                start -= 1
            announcement = "\n".join(lines[start:n])
            sentences = [match.end() for match in SENTENCE_END.finditer(announcement)]
            if sentences:
                return "\n".join([*lines[:start], announcement[: sentences[-1]]])
            n = start
        else:
            break
    return "\n".join(lines[:n]).rstrip()


def without_colon(text: str) -> str:
    """The text, without an end that announces what is not there, as an image may have been."""
    return without_loose_end(text.split("\n"), text.count("\n") + 1) if text[-1:] == ":" else text


def opens(lines: list[str], n: int) -> bool:
    """Whether line `n` is a heading, or what the next, deeper line tells more of."""
    if is_heading(lines, n) or n and is_heading(lines, n - 1):
        return True
    following = lines[n + 1] if n + 1 < len(lines) else ""
    return following.strip() != "" and indent_of(following) > indent_of(lines[n])


def is_heading(lines: list[str], n: int) -> bool:
    """Whether line `n` is underlined."""
    return (
        n + 1 < len(lines)
        and lines[n].strip() != ""
        and (n == 0 or not lines[n - 1].strip())
        and UNDERLINE.fullmatch(lines[n + 1]) is not None
        and not UNDERLINE.fullmatch(lines[n])
    )


# -------------------------------------------------------------------------------------------------
# Sections


class Section(NamedTuple):
    """Some lines of a docstring with their heading, and how early they are to be kept."""

    rank: int
    lines: list[str]


SUMMARY, PARAMETERS, RETURNS, RAISES, EXAMPLES, OTHER, SEE_ALSO, REFERENCES = range(8)
RANKS = {
    PARAMETERS: "parameters|args|arguments|params|keyword args|keyword arguments|other parameters"
    "|options|inputs?|shape|fields",
    RETURNS: "returns?|yields?|receives|outputs?|return value|return values",
    RAISES: "raises|warns|exceptions|throws|attributes|properties",
    EXAMPLES: "examples?|usage|example usage|usage examples?",
    OTHER: "notes?|warnings?|methods|todo|tips?|important|caution",
    SEE_ALSO: "see also|see",
    REFERENCES: "references?|citations?|bibliography|sources?|authors?|licen[cs]e|copyright",
}
TITLES = [(rank, re.compile(titles, re.IGNORECASE)) for rank, titles in RANKS.items()]
FIELDS = [
    (PARAMETERS, {"param", "parameter", "arg", "argument", "key", "keyword", "type", "kwarg"}),
    (RETURNS, {"return", "returns", "rtype", "yield", "yields", "ytype"}),
    (RAISES, {"raise", "raises", "except", "exception", "ivar", "cvar", "var", "vartype"}),
]
FIELD = re.compile(r":(\w+)[^:]{0,200}:( |$)")
LEAST_TRUNCATED = 200  # characters that a section has to have left for a part of it to be kept


def rank_of_title(title: str) -> int | None:
    """The rank of a section by its title, None where it has no known one."""
    return next((rank for rank, titles in TITLES if titles.fullmatch(title.strip())), None)


def rank_of_field(line: str) -> int | None:
    """The rank of a Sphinx field, None where a line is none."""
    field = FIELD.match(line)
    if not field:
        return None
    return next((rank for rank, names in FIELDS if field[1] in names), OTHER)


def sections(text: str) -> list[Section]:
    """The sections of a docstring; the first is what stands before the first heading."""
    lines = text.split("\n")
    found = [Section(SUMMARY, [])]
    indented = False  # whether the section ends where its indentation does
    for n, line in enumerate(lines):
        title = line[:-1] if line.endswith(":") and not line.startswith(" ") else ""
        field, named = rank_of_field(line), rank_of_title(title) if title else None
        if is_heading(lines, n):
            rank = rank_of_title(line)
            found.append(Section(OTHER if rank is None else rank, []))
            indented = False
        elif named is not None:
            found.append(Section(named, []))
            indented = n + 1 < len(lines) and lines[n + 1].startswith(" ")
        elif field is not None:
            if not (indented and found[-1].rank == field and FIELD.match(found[-1].lines[0])):
                found.append(Section(field, []))
            indented = True
        elif indented and line[:1].strip() and not lines[n - 1].strip():
            found.append(Section(OTHER, []))
            indented = False
        found[-1].lines.append(line)
    return [section for section in found if section.lines]


def has_body(section: Section) -> bool:
    """Whether a section is more than its heading."""
    return any(line.strip() and not UNDERLINE.fullmatch(line) for line in section.lines[1:])


def without_empty_sections(found: list[Section]) -> list[Section]:
    """The sections without known headings whose text is gone, as a plot's or an index's may be."""
    kept = []
    for section in reversed(found):
        known = rank_of_title(section.lines[0].rstrip(":")) is not None
        followed = kept and rank_of_title(kept[-1].lines[0].rstrip(":")) is None
        if has_body(section) or not known or followed:
            kept.append(section)
    return kept[::-1]


def joined(found: list[Section]) -> str:
    return "\n".join(line for section in found for line in section.lines).strip()


def shorten(found: list[Section], limit: int) -> str:
    """The sections that `limit` characters hold, those that teach most first, in their order.

    What stands before the first heading takes half of the limit at most, or what the others leave.
    """
    text = joined(found)
    if len(text) <= limit or len(found) == 1:
        return truncate(text, limit)
    kept, room = {}, limit
    others = sum(len(joined([section])) + 2 for section in found[1:])
    for n in sorted(range(len(found)), key=lambda n: found[n].rank):
        if found[n].rank == SUMMARY:
            part = truncate(joined([found[n]]), max(limit // 2, limit - others, 2) - 2)
        else:
            part = part_of(found[n], room - 2)
        if part:
            kept[n] = part + ("\n" if found[n].lines[-1].strip() else "\n\n")
            room -= len(kept[n])
    for n in sorted(kept, reverse=True):
        if n + 1 not in kept and not has_body(found[n]) and is_heading(found[n].lines, 0):
            del kept[n]  # a title above sections that are not kept
    return "".join(kept[n] for n in sorted(kept)).strip()


def part_of(section: Section, room: int) -> str:
    """What `room` characters hold of a section: all, or whole entries, paragraphs or examples."""
    text = "\n".join(section.lines).strip("\n")
    if len(text) <= room:
        return text
    if room < LEAST_TRUNCATED:
        return ""
    lines = text.split("\n")
    part = whole_blocks(lines, whole_lines(lines, room))
    return without_introduction(part) if section.rank == EXAMPLES else part


def without_introduction(examples: str) -> str:
    """Doctests without the text at their end, which tells of an example that is not there."""
    lines = examples.split("\n")
    while ">>>" in examples and ">>>" not in examples.rpartition("\n\n")[2]:
        n_kept = examples.rpartition("\n\n")[0].count("\n") + 1
        examples = without_loose_end(lines, n_kept)
    return examples


# -------------------------------------------------------------------------------------------------
# Cleaning

MOST_READ = 100  # times the limit: of megabytes of text, the beginning tells what the object is


def clean(docstring: str, limit: int) -> str:
    """A docstring as plain text of `limit` characters at most; "" where it says nothing.

    The docstring's indentation has to be its own (`inspect.cleandoc`).
    """
    docstring = docstring[: MOST_READ * limit]
    if is_noise(docstring):
        return ""
    text = with_margin(docstring)
    text = re.sub(r"\A((?!\.\.)[^\n]*\.)\n[ \t]+(?=\S)", r"\1\n\n", text)  # a summary
    text = textwrap.dedent(visible_text(text)).strip()
    text = re.sub(r" at 0x[0-9a-fA-F]+(?=>)", "", text)  # an address is another at each run
    text = re.sub(r"\n{3,}", "\n\n", text)
    if says_nothing(text):
        return ""
    text = shorten(without_empty_sections(sections(text)), limit)
    return without_colon(text) or text
