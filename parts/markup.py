"""What a reader of the documentation sees of a docstring's markup.

reStructuredText with Sphinx's roles and directives, and the marks of Markdown and Doxygen that
docstrings use. Patterns, not docutils: docstrings are often not valid, and the source's layout is
the plain text that people know.

The text is read twice. `blocks` goes over its lines and tells text from what is left alone (code,
doctests, formulas) and from tables; it resolves what fills lines: directives, fences, comments,
definitions. `inline_markup` then replaces the marks inside a paragraph. Every search is bounded, so
that the time grows with the length of the text alone.
"""

import re
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from parts.inline_markup import inline

# -------------------------------------------------------------------------------------------------
# Lines


class Block(NamedTuple):
    """Neighbouring lines of one kind: "text", "table", or "code", which is left as it is."""

    kind: str
    lines: list[str]


Read = tuple[list[Block], int]  # what a reader makes of the lines, and the first line after it

ADMONITIONS = {
    "attention": "Attention", "caution": "Caution", "danger": "Danger", "error": "Error",
    "hint": "Hint", "important": "Important", "note": "Note", "notes": "Notes",
    "seealso": "See also", "tip": "Tip", "warning": "Warning", "warn": "Warning",
    "engine-support": "Engine support",
}  # fmt: skip
VERSIONS = {
    "versionadded": "New in version",
    "versionchanged": "Changed in version",
    "versionremoved": "Removed in version",
    "deprecated": "Deprecated since version",
}
# Their content is shown as it is written.
CODE = {
    "code", "code-block", "sourcecode", "doctest", "testcode", "testoutput", "prompt",
    "parsed-literal", "ipython", "plot", "jupyter-execute", "doctest-skip", "doctest-requires",
    "doctest-remote-data", "math", "productionlist",
}  # fmt: skip
# Neither argument nor content is shown.
HIDDEN = {
    "include", "literalinclude", "image", "toctree", "index", "raw", "meta", "highlight",
    "highlightlang", "module", "currentmodule", "py:module", "py:currentmodule", "default-role",
    "role", "default-domain", "tabularcolumns", "todo", "todolist", "testsetup", "testcleanup",
    "doctest-skip-all", "graphviz", "digraph", "graph", "uml", "mermaid", "inheritance-diagram",
    "minigallery", "bibliography", "footbibliography", "contents", "sectnum", "moduleauthor",
    "sectionauthor", "codeauthor", "automodule", "rst-class", "comment", "target-notes",
}  # fmt: skip
# The content is shown, the argument is not.
CONTAINERS = {
    "container", "figure", "only", "ifconfig", "tabs", "tab-set", "grid", "hlist",
    "autosummary", "compound", "list-table", "glossary", "legacy", "tags", "cssclass",
    "math-block", "epigraph", "highlights", "pull-quote",
}  # fmt: skip
DIRECTIVE = re.compile(r"( *)\.\. *(?:\|[^|]+\| )?([A-Za-z][\w:.+-]{0,60}?) ?::(?:\s+(.*))?")
# One colon makes a comment of it, but everybody means the directive.
MISTYPED = re.compile(rf"( *)\.\. *({'|'.join([*ADMONITIONS, *VERSIONS])}) ?:(?:\s+(.*))?", re.I)
OPTION = re.compile(r"\s+:[\w-]+:(\s|$)")
MKDOCS_ADMONITION = re.compile(r'( *)(?:!!!|\?\?\?\+?) +(\w+)[\w -]{0,80}?(?: +"(.{0,200})")?')
VERSION = re.compile(r"(v?\d[\w.+-]*|\S+$)(?:[,:]?\s+(.*))?")
NOTE_OR_CITATION = re.compile(r"( *)\.\. ?\[#?([^\]\s]{1,60})\](\s.*|$)")
COMMENT = re.compile(r" *(\.\.( .*)?|__ \S+)")
FENCE = re.compile(r"\s*(```+)[^`]{0,80}")
DOCTEST = re.compile(r"\s*(>>>|In \[\d+\]:)(\s|$)")
SIMPLE_TABLE = re.compile(r"\s*=+( +=+)+\s*")
TABLE_ROW = re.compile(r"\s*(\+[-=+]+\+|\|.*\|)\s*")
# Of a text's first line, that it is no running text.
NO_PROSE = re.compile(r"\s*(\.\. |>>>|[-*+•] |\d+[.)] |\||\+-|==|:\w)")


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


def body_end(lines: list[str], start: int, indent: int) -> int:
    """The end of the lines from `start` on that are deeper than `indent`; blank ends stay out."""
    end = start
    for at in range(start, len(lines)):
        if lines[at].strip():
            if indent_of(lines[at]) <= indent:
                break
            end = at + 1
    return end


def read_fence(lines: list[str], at: int) -> Read | None:
    """A Markdown code block: its content without the fences, indented as code is elsewhere."""
    opening = FENCE.fullmatch(lines[at])
    if not opening:
        return None
    end = next((n for n in range(at + 1, len(lines)) if FENCE.fullmatch(lines[n])), None)
    if end is None or lines[end].strip() != opening[1]:  # a mark that opens nothing
        return [], at + 1
    code = lines[at + 1 : end]
    margin = "" if indent_of(lines[at]) or any(map(DOCTEST.match, code)) else "    "
    code = [f"{margin}{line}" if line.strip() else "" for line in code]
    return [Block("code", ["", *code, ""])], end + 1


def read_doctest(lines: list[str], at: int) -> Read | None:
    """A doctest with its output, up to a blank line."""
    if not DOCTEST.match(lines[at]):
        return None
    end = next((n for n in range(at, len(lines)) if not lines[n].strip()), len(lines))
    return [Block("code", lines[at:end])], end


def read_table(lines: list[str], at: int) -> Read | None:
    """A table, whose columns stay aligned."""
    if SIMPLE_TABLE.fullmatch(lines[at]):
        for end in range(at + 2, min(at + 60, len(lines))):
            closed = end + 1 == len(lines) or not lines[end + 1].strip()
            if closed and SIMPLE_TABLE.fullmatch(lines[end]):
                return [Block("table", lines[at : end + 1])], end + 1
    if TABLE_ROW.fullmatch(lines[at]):
        return [Block("table", [lines[at]])], at + 1
    return None


def read_directive(lines: list[str], at: int) -> Read | None:
    """The lines that a reader sees of a directive."""
    match = DIRECTIVE.fullmatch(lines[at]) or MISTYPED.fullmatch(lines[at])
    if not match:
        return None
    indent, name, argument = match[1], match[2].lower(), (match[3] or "").strip()
    start = at + 1
    while (
        start < len(lines) and OPTION.match(lines[start]) and indent_of(lines[start]) > len(indent)
    ):
        start += 1
    if name in HIDDEN or "|" in match[0][: match.start(2)]:
        return [], body_end(lines, start, len(indent))
    if name in CODE:
        end = body_end(lines, start, len(indent))
        formula = [f"{indent}    {argument}"] if name == "math" and argument else []
        return [Block("code", ["", *formula, *lines[start:end]])], end
    if name in CONTAINERS:
        return [], start
    if name in ADMONITIONS:
        return label(lines, start, indent, ADMONITIONS[name], argument)
    if name in VERSIONS:
        version = VERSION.fullmatch(argument)
        if version:
            shown = f"{VERSIONS[name]} {version[1]}"
            return label(lines, start, indent, shown, version[2] or "")
        return label(lines, start, indent, VERSIONS[name].split()[0], argument)
    if name in ("admonition", "topic"):
        return label(lines, start, indent, argument.rstrip(":") or "Note", "")
    return [Block("text", [f"{indent}{argument}"])], start


def label(lines: list[str], start: int, indent: str, name: str, text: str) -> Read:
    """A label before its text: `name: text`, or on a line of its own above a list or code."""
    if text:  # read again, since it may announce code
        lines[start - 1] = f"{indent}{name}: {text}"
        return [], start - 1
    first = next((n for n in range(start, len(lines)) if lines[n].strip()), None)
    has_body = first is not None and indent_of(lines[first]) > len(indent)
    if has_body and not NO_PROSE.match(lines[first]) and not lines[first].endswith("::"):
        return [Block("text", [f"{indent}{name}: {lines[first].strip()}"])], first + 1
    if has_body:
        return [Block("text", [f"{indent}{name}:"])], start
    is_version = name.startswith(tuple(VERSIONS.values()))
    return [Block("text", [f"{indent}{name}"] if is_version else [])], start


def read_mkdocs_admonition(lines: list[str], at: int) -> Read | None:
    """The title, or else the kind, of `!!! kind "title"` before its text."""
    match = MKDOCS_ADMONITION.fullmatch(lines[at])
    if not match:
        return None
    indent, name, title = match.groups()
    if title is None:
        title = ADMONITIONS.get(name.lower(), name.capitalize())
    return label(lines, at + 1, indent, title, "") if title else ([], at + 1)


def read_explicit(lines: list[str], at: int) -> Read | None:
    """A footnote or citation, which is shown, or a target or comment, which is not."""
    note = NOTE_OR_CITATION.fullmatch(lines[at])
    if note:
        return [Block("text", [f"{note[1]}[{note[2]}]{note[3]}"])], at + 1
    if not COMMENT.fullmatch(lines[at]):
        return None
    text = lines[at].strip()
    if text == ".." and at + 1 < len(lines) and not lines[at + 1].strip():
        return [], at + 1
    return [], body_end(lines, at + 1, indent_of(lines[at]))


def read_literal(lines: list[str], at: int) -> Read | None:
    """A line that ends in `::`, with the code that it announces."""
    text = lines[at]
    before = text[:-2].rstrip()
    if not text.endswith("::") or before.endswith(":"):
        return None
    end = body_end(lines, at + 1, indent_of(text))
    shown = [] if not before else [text[:-1]] if before == text[:-2] else [before]
    return [Block("text", shown), Block("code", lines[at + 1 : end])], end


# What a reader may begin with.
MARKED = re.compile(r"\s*(```|>>>|In \[|\.\.|__ |[=+|]|!!!|\?\?\?)|.*::$")
READERS = (
    read_fence, read_doctest, read_directive, read_mkdocs_admonition, read_explicit, read_table,
    read_literal,
)  # fmt: skip


def blocks(lines: list[str]) -> Iterator[Block]:
    """The blocks of a text, without the marks that fill lines."""
    at = 0
    while at < len(lines):
        readers = READERS if MARKED.match(lines[at]) else ()
        found = next(filter(None, (read(lines, at) for read in readers)), None)
        read_blocks, at = found or ([Block("text", [lines[at]])], at + 1)
        yield from read_blocks


# -------------------------------------------------------------------------------------------------
# Marks at the beginning of a line

Marks = list[tuple[re.Pattern, str]]  # each pattern with what is shown of it


def marks(*pairs: tuple[str, str]) -> Marks:
    return [(re.compile(pattern), shown) for pattern, shown in pairs]


DOXYGEN = re.compile(
    r"^[ \t]*[@\\](?:brief|details|param|tparam|returns?|throws?|exception)\b", re.M
)
DOXYGEN_MARKS = marks(
    (r"^(\s*)[@\\](?:brief|details|short)\s+", r"\1"),
    (r"^(\s*)[@\\]t?param(?:\[[\w, ]*\])?\s+([\w.*]+)\s*[:-]?\s*", r"\1:param \2: "),
    (r"^(\s*)[@\\]type\s+([\w.*]+)\s*[:-]?\s*", r"\1:type \2: "),
    (r"^(\s*)[@\\]returns?\s*[:-]?\s*", r"\1:returns: "),
    (r"^(\s*)[@\\]rtype\s*[:-]?\s*", r"\1:rtype: "),
    (r"^(\s*)[@\\](?:throws?|exception|raises?)\s+([\w.]+)\s*[:-]?\s*", r"\1:raises \2: "),
    (r"^(\s*)[@\\](?:note|remarks?)\s*[:-]?\s*", r"\1Note: "),
    (r"^(\s*)[@\\](?:warning|attention)\s*[:-]?\s*", r"\1Warning: "),
    (r"^(\s*)[@\\](?:see|sa)\s*[:-]?\s*", r"\1See also: "),
    (r"^(\s*)[@\\]deprecated\s*[:-]?\s*", r"\1Deprecated: "),
    (r"^(\s*)[@\\](?:since|version)\s*[:-]?\s*", r"\1Since: "),
    (r"^\s*[@\\](?:end)?(?:code|verbatim)\b.*", ""),
    (r"(?<![\w@\\])[@\\](?:c|p|a|e|em|b|ref)\s+(?=\w)", ""),
    (r"\{@(?:link|code)\s+([^{}]{1,200})\}", r"\1"),
)
LINE_MARKS = marks(
    (r"^ {0,3}#{2,6} +", ""),
    (r"^\s*</?Tip(?: [^<>]*)?>\s*$", ""),
    (r"^\s*\[\[autodoc\]\].*$", ""),
    (r"^(\s*)<Added version=\"([^\"]+)\" ?/>$", r"\1New in version \2"),
    (r"^(\s*)<Changed version=\"([^\"]+)\" ?/?>$", r"\1Changed in version \2"),
    (r"^(\s*)<Deprecated version=\"([^\"]+)\" ?/?>$", r"\1Deprecated since version \2"),
    (r"^\s*</(?:Added|Changed|Deprecated)>$", ""),
    (r"(?<=\S) *# noqa\b.*", ""),
    (r"^:(?:meta|orphan|no-?index|nosearch)\b[^:]*:.*", ""),
)
# A template's line that was to be filled in.
PLACEHOLDERS = marks((r"^\s*(%\([\w:]+\)s|\$?\{_?[A-Za-z]\w*\})\s*$", ""))


def without_marks(line: str, marks: Marks) -> str:
    for pattern, shown in marks:
        line = pattern.sub(shown, line)
    return line


# -------------------------------------------------------------------------------------------------
# The text

DOCTEST_FLAG = re.compile(r"(?<=\S) *# *doctest: *[+-]\w.*")  # Sphinx does not show it
SECTION = re.compile(r"(Args|Arguments|Parameters|Returns?|Yields|Raises|Examples?|Notes?):?")
RUN = re.compile(r"(?<=\S) {3,}(?=\S)")
ANY_MARK = re.compile(r"[^\w\s.,;()'\"?!/-]|_(?!\w)|---|   |http")
OVERLINE = re.compile(r"([=~*#^-])\1{2,}")
TARGET = re.compile(r"^ *\.\. _`?([\w][\w .-]{0,80})`?:(?: |$)", re.MULTILINE)
REFERENCE = re.compile(r"(?<![\w`])([A-Za-z][\w-]{0,80})_(?!\w)")
DEFINITION = re.compile(r"^ *\.\. \|([^|\n]{1,80})\| replace:: *(.*)$", re.MULTILINE)
SUBSTITUTION = re.compile(r"\|([^|\n]{1,80})\|")


def with_margin(docstring: str) -> str:
    """The docstring without an indentation that stayed since newlines are in its sentences.

    Such a one, of a `\\n` in a literal that is not raw, puts what follows it at the margin.
    """
    lines = docstring.split("\n")
    filled = [n for n, line in enumerate(lines) if n and line.strip()]
    strays = [n for n in filled if not lines[n].startswith(" ")]
    margin = min((indent_of(lines[n]) for n in filled if lines[n].startswith(" ")), default=0)
    if (
        not 0 < 8 * len(strays) <= len(filled)
        or not all(lines[n - 1].startswith(" ") for n in strays)
        or not any(SECTION.fullmatch(lines[n][margin:]) for n in filled)
    ):
        return docstring
    for n in strays:
        lines[n] = " " * indent_of(lines[n - 1]) + lines[n]
    return "\n".join([lines[0], *(line[margin:] for line in lines[1:])])


def single_spaced(lines: list[str]) -> list[str]:
    """Lines without the runs of spaces that continued string literals leave; columns stay."""
    result = list(lines)
    for n, line in enumerate(lines):
        run = RUN.search(line)
        if not run or line[: run.start()].count(" ", indent_of(line)) < 2:
            continue
        neighbours = lines[max(0, n - 1) : n] + lines[n + 1 : n + 2]
        if not any(begins_at(other, run.end()) for other in neighbours):
            result[n] = RUN.sub(" ", line)
    return result


def begins_at(line: str, column: int) -> bool:
    """Whether a column of a table, or a line, begins at a column."""
    return line[column - 2 : column] == "  " and line[column : column + 1].strip() != ""


def visible_text(docstring: str) -> str:
    """The plain text that a reader of the documentation sees of a docstring.

    The source's layout stays; code, doctests and formulas stay as they are.
    """
    source = [line.rstrip() for line in docstring.split("\n")]
    targets = set(TARGET.findall(docstring))
    definitions = dict(DEFINITION.findall(docstring))
    line_marks = PLACEHOLDERS + LINE_MARKS + (DOXYGEN_MARKS if DOXYGEN.search(docstring) else [])

    def shown_paragraph(lines: list[str]) -> list[str]:
        if not ANY_MARK.search("\n".join(lines)):
            return lines
        if len(lines) >= 3 and lines[0] == lines[2] and OVERLINE.fullmatch(lines[0]):
            lines = lines[1:]
        text = "\n".join(without_marks(line, line_marks) for line in single_spaced(lines))
        if definitions:
            text = SUBSTITUTION.sub(lambda match: definitions.get(match[1], match[0]), text)
        if targets:
            text = REFERENCE.sub(lambda m: m[1] if m[1] in targets else m[0], text)
        return inline(text).split("\n")

    shown = []
    for kind, found in groupby(blocks(source), lambda block: block.kind):
        lines = [line.rstrip() for block in found for line in block.lines]
        if kind == "code":
            shown += [DOCTEST_FLAG.sub("", line) for line in lines]
        elif kind == "table":
            shown += [inline(line, pad=True).rstrip() for line in lines]
        else:
            for is_text, group in groupby(lines, bool):
                paragraph = list(group)
                shown += shown_paragraph(paragraph) if is_text else paragraph
    return "\n".join(shown)
