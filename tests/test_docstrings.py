"""parts/docstrings.py and parts/markup.py: docstrings as plain text that is fit to learn from."""

import pytest

from parts import docstrings

LIMIT = 2048


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
