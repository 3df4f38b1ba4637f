"""Docstrings as plain text fit to learn from: parts/docstrings.py with its two parts for markup."""

import inspect
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from parts import docstrings

LIMIT = 2048


def clean(docstring: str, limit: int = LIMIT) -> str:
    return docstrings.clean(docstring, limit)


@pytest.mark.parametrize(
    ("docstring", "cleaned"),
    [
        ("See :func:`relu`.", "See relu."),
        ("See :py:class:`~mlx.nn.ReLU` and :ref:`this page <usage>`.", "See ReLU and this page."),
        ("Sum.\n\n.. math::\n\n    a + b\n", "Sum.\n\n    a + b"),
        (".. note:: Slow.\n\n>>> f(1)\n2", "Note: Slow.\n\n>>> f(1)\n2"),
        ("One.   \n\n\n\nTwo ``x`` and `y`.", "One.\n\nTwo ``x`` and `y`."),
        ("Summary.\n    More of it.", "Summary.\n\nMore of it."),
        ("Calls <function f at 0x7f03ab>.", "Calls <function f>."),
        (".. code-block:: python\n   :linenos:\n\n   f(x)", "f(x)"),
        ("Text.\n\n.. versionadded:: 1.2", "Text.\n\nNew in version 1.2"),
        ("A.\n\n  .. versionadded:: 1\n  :returns: x", "A.\n\n  New in version 1\n  :returns: x"),
        (".. currentmodule:: mlx", ""),
    ],
)
def test_docstrings_are_cleaned(docstring, cleaned):
    assert docstrings.clean(docstring, LIMIT) == cleaned


@pytest.mark.parametrize(
    ("docstring", "seen"),
    [
        # Names: the leading dot, the tilde, the exclamation mark, modules that nobody names.
        ("Use :meth:`.Select.where` first.", "Use Select.where first."),
        ("See :class:`~a.B`, :func:`~.c.d()`.", "See B, d()."),
        ("See `~.Foo.bar`, `~a.b.C` and `.Axes.plot`.", "See bar, C and Axes.plot."),
        ("A :class:`!Hidden` and a :class:`_schema.Column`.", "A Hidden and a Column."),
        ("A :class:`dict`\\ s, and :class:``Wrong``.", "A dicts, and Wrong."),
        ("See :class:`:class:`Foo`` now.", "See Foo now."),
        ("See :external+python:py:func:`print`.", "See print."),
        ("A :py:func:`title <a.b>`\nand :ref:`the\nguide <guide>`.", "A title\nand the\nguide."),
        # Contents that are shown as they are written.
        ("The bracket :math:`<x>`, :math:`~0.5`.", "The bracket <x>, ~0.5."),
        ("A :code:`vector<int>` of :samp:`{x}`.", "A vector<int> of {x}."),
        ("Press :kbd:`<enter>` now.", "Press <enter> now."),
        ("By :pep:`8` and :rfc:`2616`.", "By PEP 8 and RFC 2616."),
        ("Of :math:`a_1*b_1*c`.", "Of a_1*b_1*c."),
        ("A ``:func:`x```, ``**y**`` and `z`.", "A ``:func:`x```, ``**y**`` and `z`."),
        ("With $a_1 *b* |ccc|$.", "With $a_1 *b* |ccc|$."),
        # Links, footnotes, citations, substitutions.
        ("See `the paper <https://a.b/c_d>`_ now.", "See the paper now."),
        ("See `<https://a.b>`__ now.", "See https://a.b now."),
        ("See `text`_ and here_.\n\n.. _here: https://a.b\n.. _text: https://c.d",
         "See text and here."),
        ("The coef_ stays, and https://a.b/c_d*e*.", "The coef_ stays, and https://a.b/c_d*e*."),
        ("As in [1]_ and [Foo2000]_, [#n]_.\n\n.. [1] A book.\n.. [Foo2000] Another.",
         "As in [1] and [Foo2000], [n].\n\n[1] A book.\n[Foo2000] Another."),
        ("A |name|, |x| or |y|.\n\n.. |x| replace:: text\n.. |z| image:: z.png",
         "A name, text or |y|."),
        ("Where _`this` is.", "Where this is."),
        # Emphasis and escapes.
        ("A **bold** word, *another*.", "A bold word, another."),
        ("Call f(*a, **b), 2**3**4 or a *b.", "Call f(*a, **b), 2**3**4 or a *b."),
        ("\\*args, \\*\\*kwargs and a\\_b.", "*args, **kwargs and a_b."),
        ("A line \\\n    that goes on.", "A line that goes on."),
        # Markdown and Hugging Face's.
        ("See [the docs](https://a.b) and x[1](2).", "See the docs and x[1](2)."),
        ("A [`~a.Model.fit`] of [`Model`] ![x](y.png).", "A fit of Model ."),
        ("## Title\n\n<Tip warning={true}>\n\nText.\n\n</Tip>", "Title\n\nText."),
        ('A.\n\n<Added version="2.1"/>', "A.\n\nNew in version 2.1"),
        ("Code.\n```python\nx = *a*\n```\nMore.", "Code.\n\n    x = *a*\n\nMore."),
        # Of Google's protocols and of mkdocstrings.
        ("For\n[A.Get][google.a.v1.A.Get], the [`x` value][a.x].", "For\nA.Get, the `x` value."),
        ("Of [`A`][a.b.A], [`C`][] and x[a][b.c], [a][0].", "Of A, C and x[a][b.c], [a][0]."),
        # Types of fields and parameters, which need no role.
        (":rtype: ~a.b.C[~a.b.D] or\n ~a.E", ":rtype: C[D] or\n E"),
        ("Args:\n    x (~a.B): ~x.any(), a & ~m.b.", "Args:\n    x (B): ~x.any(), a & ~m.b."),
        ("A |~settings.deadline| of |~settings|.", "A deadline of settings."),
        # Doxygen.
        ("@brief Adds.\n\n@param[in] x the first\n@return \\p x plus one\n@note Slow.",
         "Adds.\n\n:param x: the first\n:returns: x plus one\nNote: Slow."),
    ],
)  # fmt: skip
def test_a_text_is_what_a_reader_sees(docstring, seen):
    assert clean(docstring) == seen


@pytest.mark.parametrize(
    ("docstring", "seen"),
    [
        (".. warning::\n\n   Hot.\n   Very.\n\nText.", "Warning: Hot.\n   Very.\n\nText."),
        (".. seealso:: :func:`f`", "See also: f"),
        (".. tip::\n   - one\n   - two", "Tip:\n   - one\n   - two"),
        (".. Note: Once.", "Note: Once."),
        ('!!! abstract "Usage"\n    [`A` page](../a.md)\n\nB.', "Usage: `A` page\n\nB."),
        ("!!! warning\n    Hot.\n\nNot !!! this.", "Warning: Hot.\n\nNot !!! this."),
        ("A.\n\n.. engine-support:: streaming", "A.\n\nEngine support: streaming"),
        (".. admonition:: Theory\n\n   It is.", "Theory: It is."),
        ("A.\n\n.. deprecated:: 1\n   Use :func:`g`.", "A.\n\nDeprecated since version 1: Use g."),
        ("A.\n\n..versionchanged:: 1.2 Faster.", "A.\n\nChanged in version 1.2: Faster."),
        ("Is\n\n.. math :: a*b*c\n   :label: x\n\nso.", "Is\n\n    a*b*c\n\nso."),
        ("A.\n\n.. image:: a.png\n   :width: 3\n\nB.", "A.\n\nB."),
        ("A.\n\n.. figure:: a.png\n   :alt: x\n\n   The caption.", "A.\n\n   The caption."),
        ("A.\n\n.. literalinclude:: a\n\n.. index:: a\n\n.. toctree::\n\n   b\n\nC.", "A.\n\nC."),
        ("A.\n\n.. container:: wide\n\n   B.", "A.\n\n   B."),
        ("A.\n\n.. plot:: a.py\n   :context:\n\n   >>> f()\n   1", "A.\n\n   >>> f()\n   1"),
        ("A.\n\n.. a comment\n   of two lines\n\nB.", "A.\n\nB."),
        ("A.\n\n.. py:function:: f(x)\n\n   Of x.", "A.\n\nf(x)\n\n   Of x."),
        ("A.\n\n.. rubric:: Uses", "A.\n\nUses"),
        ("=====\nTitle\n=====\n\nText.", "Title\n=====\n\nText."),
        ("A.\n\nSee Also\n--------\n.. toctree::\n\n   b", "A."),
        ("A. As here:\n\n.. image:: a.png", "A."),
    ],
)  # fmt: skip
def test_directives_are_what_a_reader_sees(docstring, seen):
    assert clean(docstring) == seen


CODE = [
    "A. So::\n\n    x = :f:`a`  *b* \\*  # x   y\n\nB.",
    "A.\n\n>>> x = ':f:`a`'   # *b*\n1    2\n\nB.",
    "A.\n\n.. code-block:: c\n\n   int *a, *b;   :f:`a`\n\nB.",
    "A.\n\n```\n    x *a* :f:`a`    b\n```\n\nB.",
]


@pytest.mark.parametrize("docstring", CODE)
def test_code_stays_as_it_is(docstring):
    code = [line for line in docstring.split("\n") if ":f:`" in line]
    assert code[0] in clean(docstring)


def test_a_newline_in_a_sentence_leaves_no_indentation():
    lines = ["Reads.", "", "    Args:", *["        x: The end."] * 8, "        y: Such as '", "'."]
    shown = ["Reads.", "", "Args:", *["    x: The end."] * 8, "    y: Such as '", "    '."]
    assert clean("\n".join(lines)) == "\n".join(shown)
    code = "\n".join(["Reads:", "", *["    x = 1"] * 8, "so."])
    assert clean(code) == code


def test_flags_of_doctests_are_not_shown():
    assert clean("A.\n\n>>> f(1)  # doctest: +SKIP\n2") == "A.\n\n>>> f(1)\n2"


def test_a_table_keeps_its_columns():
    table = "A.\n\n====== ====\n:a:`x` B C\n**y**  two\n====== ===="
    assert clean(table) == "A.\n\n====== ====\nx      B C\ny      two\n====== ===="
    columns = "A.\n\nthe first of     all words\nthe second is    another one"
    assert clean(columns) == columns


def test_runs_of_spaces_of_a_continued_line_are_one():
    assert clean("One of the             words.\nMore.") == "One of the words.\nMore."


@pytest.mark.parametrize(
    "docstring",
    [
        "Alias for field number 0",
        "f(x: int) -> list[int]",
        "f(self: a.B, x: tuple[int, str] = (1, 'a')) -> a.B\nf(y) -> None",
        "(self) -> int",
        "Overloaded function.\n\n1. f(x: int) -> int\n\n2. f(x: str) -> str",
        "Copyright (c) 2020 Somebody. All rights reserved.",
        "Copyright 1999 Somebody.\nLicensed under MIT.\n\nPermission is hereby granted, free.",
        "%(before_notes)s",
        "{_shared_doc}",
        "Return %(klass)s of the group.",
        "Text.\n\nParameters\n----------%(by)s\naxis : %(axes)s",
        "TODO",
        "Not implemented",
        "See base class.",
        "---",
        "No docstring available.",
        "Members:\n\nSUM\n\nAVG",
    ],
)
def test_noise_says_nothing(docstring):
    assert clean(docstring) == ""


@pytest.mark.parametrize(
    "docstring",
    [
        "f(x) -> int\n\nThe size of x.",
        "f(x) does it.",
        "The terms of the series.",
        'Returns its argument "as is".',
        "'AM' or 'PM'",
        "Return (a) or (b)",
        "Reads a text.\n\nCopyright (c) 2020 Somebody.",
        "Accepts ``%(name)s`` as a parameter.",
        "See base class for the parameters; this one adds a cache.",
        "Members:\n\nSUM : adds up\n\nAVG : the mean",
        "Gets it.\n\n:raises ValueError:",
    ],
)
def test_what_says_something_stays(docstring):
    assert clean(docstring) == docstring


def test_placeholders_on_their_lines_go():
    template = "A random variable.\n\n%(before_notes)s\n\nNotes\n-----\nIt is.\n\n%(example)s"
    assert clean(template) == "A random variable.\n\nNotes\n-----\nIt is."


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("One two.\n\nThree four.", 100, "One two.\n\nThree four."),
        ("One two.\n\nThree four.", 15, "One two."),
        ("One two\nThree four", 15, "One two\nThree"),
        ("One two\nThree four", 12, "One two"),
        ("One two three", 9, "One two"),
        ("One two", 7, "One two"),
        ("Onetwothree", 4, "Onet"),
        ("One.\n\nTwo three four five six.", 22, "One.\n\nTwo three four"),
        ("Text.\n>>> f(1, 2)\n3", 14, "Text."),
        ("cafe\u0301s", 4, "caf"),
    ],
)
def test_long_docstrings_are_truncated_between_paragraphs_lines_or_words(text, limit, expected):
    assert docstrings.truncate(text, limit) == expected


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        # A colon, a heading, a parameter, an input; sentences and items stay whole.
        ("First sentence here. It takes:\n\n    a", 33, "First sentence here."),
        ("First paragraph here.\n\nNotes\n-----\nText", 36, "First paragraph here."),
        ("The first text of it.\n\nx : int\n    Its x.", 36, "The first text of it."),
        (">>> a\n1\n>>> b\n2\n>>> c\n33333", 22, ">>> a\n1\n>>> b\n2"),
        (">>> print(a)\n1\n>>> df\n   x\na  1\nb  2", 27, ">>> print(a)\n1"),
        ("  >>> a\n  1\nText after it.", 16, "  >>> a\n  1"),
        (
            "Args:\n  a (int, b): first\n  b: second\n  c: third",
            37,
            "Args:\n  a (int, b): first\n  b: second",
        ),
        ("One sentence is here. Another one is longer.", 40, "One sentence is here."),
        ("- the first item\n- the second\n  item is longer", 31, "- the first item"),
    ],
)
def test_an_end_that_promises_more_goes(text, limit, expected):
    assert docstrings.truncate(text, limit) == expected


NUMPYDOC = """Summary.

Parameters
----------
x : int
    {0} parameter.
y : int
    {0} second.

Returns
-------
int
    {0} result.

Notes
-----
{0} note.

References
----------
.. [1] {0} book.

Examples
--------
An example:

>>> f(1)
{0}
>>> f(2)
{0}
"""
GOOGLE = """Summary.

Args:
    x (int): {0} parameter.
    y (int): {0} second.

Returns:
    {0} result.

Note:
    {0} note.

Example::

    f(1)  # {0}
"""
FIELDS = """Summary.

:param x: {0} parameter.
:param y: {0} second.
:returns: {0} result.

{0} note.
"""


@pytest.mark.parametrize(
    ("docstring", "room", "kept", "dropped"),
    [
        (NUMPYDOC, 1200, "parameter second result f(1) f(2)", "note book References Notes"),
        (NUMPYDOC, 720, "parameter second result", "An f(1) note Examples"),
        (NUMPYDOC, 400, "parameter", "second note Notes Returns f("),
        (GOOGLE, 920, "parameter second result f(1)", "note"),
        (GOOGLE, 700, "parameter second result", "note f(1)"),
        (FIELDS, 700, "parameter second result", "note"),
    ],
)
def test_sections_that_teach_most_are_kept_whole_and_in_their_order(docstring, room, kept, dropped):
    text = clean(docstring.format("word " * 40), room)
    places = [text.find(word) for word in kept.split()]
    assert -1 not in places
    assert places == sorted(places)
    assert not [word for word in dropped.split() if word in text]
    assert text.startswith("Summary.")
    assert len(text) <= room


def test_text_that_fits_keeps_its_sections():
    assert clean(NUMPYDOC.format("A")) == NUMPYDOC.format("A").replace(".. [1]", "[1]").strip()


MARKUP = st.sampled_from(
    [":a:`", "`", "``", ">>> x", "...", "\n", "\n\n", "    ", ".. note::", ".. ", "::", "*", "**"]
    + ["_", "[1]_", "|", "```", "---", "===  ==", "Args:", ":param x:", "Examples", "$", "\\", "<"]
    + [">", "%(x)s", "[a](http://b)", "(", ")", "x : int", "word", ".", ":", "# ", "@param "]
)


@settings(max_examples=150, deadline=None)
@given(st.text() | st.lists(MARKUP).map("".join), st.integers(1, 80))
@example(":a:`" * 3, 5)
@example(".. admonition::\n  .. note::\n    ::", 20)
def test_any_text_is_cleaned(text, limit):
    cleaned = docstrings.clean(text, limit)
    assert len(cleaned) <= limit
    assert len(docstrings.clean(cleaned, limit)) <= limit
    assert len(docstrings.truncate(text, limit)) <= limit


REAL = [inspect.cleandoc(f.__doc__) for f in (np.add, np.linalg.svd, np.einsum, np.histogram)]


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(REAL), st.integers(0, 4000), st.integers(0, 300), MARKUP)
def test_damaged_docstrings_are_cleaned(docstring, start, n_lost, inserted):
    damaged = docstring[:start] + inserted + docstring[start + n_lost :]
    assert len(docstrings.clean(damaged, LIMIT)) <= LIMIT


ODD = (
    [
        *":*`_|$\\[(#=.<>-+ \n@a",
        ":a:",
        ":a:`",
        "`` ",
        "``x ",
        "**a",
        "*a ",
        "[`",
        "![",
        "[a](",
        "|a",
    ]
    + ["```\n", "```a\n", "`````\n````\n", ".. note::\n", ".. note: a\n", "a::\n", "a::\n\n", "a_ "]
    + [
        ".. [1] a\n",
        ".. a\n",
        "=== ===\n",
        "=== ===\na\n",
        ">>> a\n",
        "a. ",
        "a.b.",
        "a: ",
        "\n ",
        "! ",
        "a!",
    ]
    + [" \\ ", "x   ", "f(", "f(x)\n", "a\n---\n", "Args:\n", "Args:\n  a:\n", ":param x:\n", "$a"]
    + [
        ".. _a:\n",
        ".. |a| replace:: b\n",
        "(c) ",
        "%(a)s\n",
        " at 0x0",
        ":a:`b<",
        "`a <",
        "http://",
    ]
    + [
        "  .. math::\n",
        "a\n\n",
        "    a\n\n",
        "- a\n",
        "a.\n",
        ".. _",
        "..",
        ">>>",
        "...\n",
        "f(x) -> ",
    ]
    + [
        "[a][",
        "[a][b.",
        "[a]\n",
        "~a.",
        " ~a.b",
        "|~a.",
        "!!! a",
        '!!! a "',
        "??? a\n",
        ">>> a\nb\n",
    ]
)


@pytest.mark.parametrize("unit", ODD)
def test_the_time_grows_with_the_length_alone(unit):
    text = unit * (20_000 // len(unit))
    indented = text.replace("\n", "\n ")
    for docstring in (text, f"Text.\n\n{indented}"):
        start = time.process_time()
        assert len(docstrings.clean(docstring, LIMIT)) <= LIMIT
        assert time.process_time() - start < 1  # some hundredths of a second


def test_of_megabytes_the_beginning_is_read():
    text = "Sum.\n\n" + "item::\n\n" * 1_000_000
    start = time.process_time()
    assert docstrings.clean(text, LIMIT) == "Sum."
    assert time.process_time() - start < 10  # it takes one; all of the text, a minute and a half


def test_the_parts_import_nothing_but_the_standard_library():
    names = "import sys, parts.docstrings; print(*{name.split('.')[0] for name in sys.modules})"
    command = [sys.executable, "-S", "-c", names]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) - set(sys.stdlib_module_names) <= {"parts", "__main__", "__mp_main__"}
