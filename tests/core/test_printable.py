"""Text of any origin becomes one printable line of bounded length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.core.printable import one_line, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain äß 和", "plain äß 和"),
        ("a\nb", r"a\nb"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\udcff", r"\udcff"),
        ("a\u202eb", r"a\u202eb"),
        ("", ""),
    ],
)
def test_unprintable_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_long_text_keeps_begin_and_end() -> None:
    assert printable("a" * 10 + "b" * 10, limit=20) == "a" * 10 + "b" * 10
    assert printable("a" * 1000 + "b" * 1000, limit=20) == "a" * 15 + " ... (2,000 characters in all) ... " + "b" * 5


def test_one_line_joins_the_lines() -> None:
    assert one_line("  first\n\tsecond \r\n third\x00") == r"first second third\x00"
    assert len(one_line("x \n" * 1_000_000)) < 4100


@given(st.text(), st.integers(4, 50))
def test_the_result_is_printable_and_bounded(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= 10 * limit + 50
    shown.encode("utf-8")
