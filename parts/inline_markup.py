"""The marks inside a paragraph, and what a reader sees of them: roles, links, emphasis, escapes.

A table of patterns, each with a bounded length, of which the first that matches wins. So nothing is
replaced inside a literal, a formula or a URL.
"""

import re
from collections.abc import Callable

# Roles whose content is shown as it is written; of others, `title <target>` shows the title.
VERBATIM_ROLES = {
    "math", "code", "kbd", "samp", "file", "command", "dfn", "guilabel", "menuselection",
    "mimetype", "newsgroup", "program", "regexp", "sub", "sup", "abbr", "strong", "emphasis",
    "literal", "makevar", "manpage", "mailheader", "index", "title", "t", "raw", "eq",
    "subscript", "superscript", "title-reference",
}  # fmt: skip
ROLE_PREFIXES = {
    "pep": "PEP ", "rfc": "RFC ", "cve": "CVE-", "cwe": "CWE-", "doi": "doi:", "arxiv": "arXiv:",
}  # fmt: skip
PRIVATE_MODULE = re.compile(r"\A_\w+\.(?=\w)")
DOTTED = re.compile(r"[\w.]*")


def title_and_target(content: str) -> tuple[str, str]:
    """The two parts of `title <target>`; an empty title where there is none."""
    title, bracket, target = content.rpartition("<")
    if not bracket or not target.endswith(">") or title.endswith("\\"):
        return "", content
    return title.strip(), target[:-1]


def shown_target(target: str) -> str:
    """What Sphinx shows of a name to link to: the last part of `~a.B`; `.B.c` without its dot."""
    short = target.startswith("~") or target.startswith(".~")
    target = PRIVATE_MODULE.sub("", target.lstrip("~!").lstrip(".").lstrip("~"))
    name = DOTTED.match(target)[0]
    return (name.rstrip(".").rsplit(".", 1)[-1] if short else name) + target[len(name) :]


def shown_role(match: re.Match) -> str:
    name, content = match["role"].rstrip(":").rsplit(":", 1)[-1].lower(), match["content"]
    if name in VERBATIM_ROLES:
        return content
    title, _ = title_and_target(content)
    if title:
        return title
    return ROLE_PREFIXES.get(name, "") + shown_target(content.strip())


def shown_link(match: re.Match) -> str:
    """The text of `text <url>`_, `text`_ or `<url>`_."""
    title, target = title_and_target(match["link"].strip())
    return title or target


def shown_doclink(match: re.Match) -> str:
    """The name in [`~a.B`], a link that Hugging Face's documentation resolves."""
    return shown_target(match["doc"])


def shown_name(match: re.Match) -> str:
    """A name in single backticks stays as it is, save that `~a.B` is what Sphinx shows as B."""
    name = match["name"]
    return shown_target(name) if re.fullmatch(r"[~.]+[A-Za-z_][\w.]*(\(\))?", name) else match[0]


# Each kind: a pattern, and what is shown of it. The first that matches wins.
INLINE: dict[str, tuple[str, str | Callable[[re.Match], str]]] = {
    "literal": (r"(?<!`)``(?=[^`\s])(?:[^`]|`(?!`)){1,1000}`?``(?!`)", r"\g<0>"),
    "url": (r"(?<!\w)(?:https?|ftp)://[^\s<>`\"')\]]{1,2000}", r"\g<0>"),
    "formula": (r"(?<![\\$\w])\$\$?[^$\n]{1,300}\$\$?(?!\w)", r"\g<0>"),
    "rolename": (
        r"(?<!:)(?P<role>:(?:[A-Za-z][\w.+-]{0,40}:){1,3})(?P<tick>``?)"
        r"(?!:[A-Za-z][\w:]{0,40}:`)(?P<content>[^`]{1,800})(?P=tick)",
        shown_role,
    ),
    "doclink": (
        r"\[`(?P<doc>[^`\n]{1,200})`\](?:\([^()\s]{1,500}\)|\[[\w.]{0,200}\])?",
        shown_doclink,
    ),
    # Of Google's protocols and of mkdocstrings: [text][a.B].
    "cross": (
        r"(?<![\w\])])\[(?P<cross>[^\[\]]{1,200})\](?:\n\s{0,40})?"
        r"\[(?:[A-Za-z]\w{0,60}\.){1,12}\w{1,80}\]",
        r"\g<cross>",
    ),
    # The type of a field or a parameter, which Sphinx links to without a role.
    "type": (
        r"(?<![^\s\[,(<])(?<![&=] )~(?:[A-Za-z_]\w{0,60}\.){1,12}(?P<type>\w{1,80})"
        r"(?![\w(]|\.\w)",
        r"\g<type>",
    ),
    "hyperlink": (r"(?<![`\w])`(?P<link>[^`]{1,500})`__?(?!\w)", shown_link),
    "anchor": (r"(?<!\w)_`(?P<anchor>[^`]{1,200})`(?!\w)", r"\g<anchor>"),
    "single": (r"(?<![`\w\\])`(?P<name>[^`\n]{1,200})`(?![`\w])", shown_name),
    "image": (r"!\[[^\[\]\n]{0,200}\]\([^()\s]{1,500}\)", ""),
    "mdlink": (
        r"(?<![\w\])])\[(?P<text>[^\[\]]{1,200})\]\((?:https?:|mailto:|\.{0,2}/|#)[^()\s]{0,500}\)",
        r"\g<text>",
    ),
    "footnote": (r"\[#?(?P<note>[\w.:+*#-]{1,60})\]_(?!\w)", r"[\g<note>]"),
    "strong": (
        r"(?<![\w*\\/])\*\*(?=[^\s*,)])(?P<strong>[^*\n]{1,200}?)(?<=[^\s\\(,])\*\*(?![\w*])",
        r"\g<strong>",
    ),
    "emphasis": (
        r"(?<![\w*\\/.])\*(?=[\w\"'(<-])(?P<emphasis>[^*\n]{1,200}?)(?<=[^\s\\(,])\*(?![\w*])",
        r"\g<emphasis>",
    ),
    "substitution": (
        r"(?<![\w|<\\`])\|(?:~(?:\w{1,40}\.){0,8})?"
        r"(?P<shown>[A-Za-z@][\w@.-]{2,40}(?: [A-Za-z]{3,40}){0,4})\|(?![\w|>])",
        r"\g<shown>",
    ),
    "escape": (r"\\(?P<escaped>[*_`|])", r"\g<escaped>"),
    "continued": (r"\\\n\s*(?=\S)", ""),
    "seam": (r"(?<=[\w`*)\]}>])\\ (?=\S)|\\ (?=[\w:`*])", ""),
}  # fmt: skip
PATTERN = re.compile(
    r"(?=[`:_!\[*|\\$~hf])(?:"
    + "|".join(f"(?P<k_{kind}>{pattern})" for kind, (pattern, _) in INLINE.items())
    + ")"
)

NESTED = re.compile(r"(?<!\w):[a-z:]{1,40}:`")


def inline(text: str, pad: bool = False) -> str:
    """Replace the marks inside a paragraph; `pad` keeps the columns of a table."""

    def shown(match: re.Match) -> str:
        seen = INLINE[match.lastgroup.removeprefix("k_")][1]
        result = seen(match) if callable(seen) else match.expand(seen)
        return result.ljust(len(match[0])) if pad else result

    text = PATTERN.sub(shown, text)
    return PATTERN.sub(shown, text) if NESTED.search(text) else text
