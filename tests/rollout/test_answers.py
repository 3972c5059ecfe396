"""Equality of answers: pairs of every kind, held-out pairs, expressions that explode, properties."""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.rollout.rewards import mathematics
from slime.rollout.rewards.answers.exact import InexactError, exact
from slime.rollout.rewards.answers.library import MAX_TEXT, may_read
from slime.rollout.rewards.answers.trees import Node, number
from slime.rollout.rewards.mathematics import MAX_ANSWER, equal_as_mathematics
from tests.rollout.verdicts_for_tests import HELD_OUT, Pair, misses, read_pairs, report

PAIRS = read_pairs(Path(__file__).with_name("answers.tsv"))
KINDS = sorted({pair.kind for pair in PAIRS})
CPU_SECONDS = 5.0
"""The limit of one comparison. It takes a few milliseconds; an expression that explodes takes minutes."""

DEEP = 60
EXPLOSIVE = (
    *("9^{9^{9}}", "9^{9^{9^{9}}}", "10^{10^{10}}", "10^{10^{10^{10}}}", "2^{2^{2^{2^{2^{2}}}}}", "9**9**9**9"),
    *("100000000!", "(10!)!", "((10!)!)!", "9!!!!!!", "((9!)!)^{9!}", "(10^{100})!", r"\binom{10^{9}}{5\cdot10^{8}}"),
    *("1e9999", "1e999999999", "9" * 900, "0." + "9" * 900, "1" * 400 + "!", r"\frac{1}{9^{9^{9}}}"),
    *(r"\sqrt{" * DEEP + "2" + "}" * DEEP, "(" * DEEP + "x" + ")" * DEEP, "{" * DEEP + "x" + "}" * DEEP),
    *(r"\frac{1}{" * DEEP + "x" + "}" * DEEP, "x^{" * DEEP + "x" + "}" * DEEP, r"\{" * DEEP + "1" + r"\}" * DEEP),
    *("(" * 450 + "x" + ")" * 450, "(" * 900, ")" * 900, "{" * 900, "|" * 900, "-" * 900 + "1", "[" * 900),
    *(r"\sum_{i=1}^{1000000000} i", r"\prod_{i=1}^{10^{9}} i", r"\sum_{i=1}^{\infty} i"),
    r"\sum_{i=1}^{999}\sum_{j=1}^{999}\sum_{k=1}^{999} ijk",
    *(r"\int_0^1 \frac{1}{x} dx", r"\sum_{n=1}^{\infty} \frac1n"),
    *("1,2,\\ldots,10^{100}", r"\{1,2,\ldots,1000000000000\}", ",".join("1" * 300), r"\pm" * 300 + "1"),
    *("+".join(["x"] * 300), "*".join(["x+1"] * 120), "(x+1)^{100000}", "(a+b+c+d+e+f)^{99}", "x^{x^{x^{x^{x}}}}"),
    *(r"\sin(10^{10^{10}})", r"e^{e^{e^{e^{e}}}}", r"\ln(\ln(\ln(\ln(2))))", r"\tan(\frac{\pi}{2})", r"0^{0}", "1/0"),
    *(
        r"\begin{pmatrix}" + "&".join("1" * 200) + r"\end{pmatrix}",
        r"\begin{cases}" * 40,
        r"\text{" * 200,
        "a=" * 300 + "a",
    ),
    *("1<" * 300 + "x", r"(-\infty,1)\cup" * 60 + "(2,3)", r"x\ne1\text{ or }" * 50 + "x>1", "\\" * 500, "$" * 500),
    *(r"\gcd(10^{500},10^{499})", r"10^{400}\bmod 7", r"\lfloor 10^{10^{9}}\rfloor", "9_{9_{9_{9}}}", "x_{" * 200),
    *("0.(" + "9" * 500 + ")", "\u00b2" * 300, "\u221a" * 300 + "2", "\x00\x1e\ud800", "1 " * 400, r"\frac" * 200),
)


def cpu(answer: str, label: str) -> tuple[bool, float]:
    """Return the verdict, and the CPU seconds that it took."""
    start = time.process_time()
    return equal_as_mathematics(answer, label), time.process_time() - start


@pytest.mark.parametrize("kind", KINDS)
def test_pairs(kind: str) -> None:
    pairs = [pair for pair in PAIRS if pair.kind == kind]
    missed = list(misses(pairs, equal_as_mathematics))
    assert missed == [], report(pairs, missed)


def test_every_kind_has_equal_and_unequal_pairs() -> None:
    assert len(PAIRS) > 200
    for kind in KINDS:
        assert {pair.equal for pair in PAIRS if pair.kind == kind} == {True, False} or kind in ("row", "wrapping"), kind


def test_held_out_pairs() -> None:
    pairs = read_pairs(HELD_OUT)
    missed = list(misses(pairs, equal_as_mathematics))
    accepted = [pair for pair in missed if not pair.equal]
    assert accepted == [], report(pairs, missed)
    assert len(missed) <= 3, report(pairs, missed)


def test_a_grader_that_compares_texts_misses_pairs() -> None:
    """Control: the report counts both kinds of wrong verdicts."""
    found = report(PAIRS, list(misses(PAIRS, lambda answer, label: answer[:1] == label[:1])))
    accepted, refused = (int(part.split()[0]) for part in found.rsplit(":", 1)[1].split(","))
    assert accepted > 30
    assert refused > 30


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.answer}~{pair.label}"[:60])
def test_order_of_the_two_does_not_matter(pair: Pair) -> None:
    assert equal_as_mathematics(pair.label, pair.answer) == pair.equal
    assert equal_as_mathematics(pair.label, pair.label)
    assert equal_as_mathematics(pair.answer, pair.answer)


@pytest.mark.parametrize("text", EXPLOSIVE, ids=lambda text: ascii(text[:40]))
def test_expressions_that_explode_end(text: str) -> None:
    for answer, label in ((text, "2"), ("2", text), (text, text + "+1"), (f"{{{text}}}+x", f"x+{text}"), (text, text)):
        _, seconds = cpu(answer, label)
        assert seconds < CPU_SECONDS, (answer[:60], label[:60])
    assert not equal_as_mathematics(text, "2")


PIECES = st.sampled_from(
    [
        *(
            "1",
            "2",
            "12",
            "0.5",
            "x",
            "y",
            "R",
            "r",
            "h",
            "e",
            "i",
            "+",
            "-",
            "=",
            "<",
            r"\le ",
            "^",
            "_",
            "/",
            "*",
            "!",
        ),
        *(r"\frac", r"\sqrt", r"\pi ", r"\sin ", r"\log", r"\text{ or }", r"\text{cm}", r"\pm ", r"\cup ", r"\infty "),
        *(
            "{",
            "}",
            "(",
            ")",
            "[",
            "]",
            r"\{",
            r"\}",
            "|",
            ",",
            ";",
            ":",
            " ",
            "%",
            r"\$",
            r"\ldots ",
            r"\in ",
            "^\\circ",
        ),
        *("²", "½", "√", "−", "km", "AB", "word", r"\overline{3}", r"\begin{cases}", r"\\", r"\end{cases}", "&", "."),
    ]
)
TEXTS = st.lists(PIECES, min_size=1, max_size=12).map("".join)


@settings(deadline=None, max_examples=150)
@given(TEXTS, TEXTS)
def test_no_input_raises_and_the_relation_is_symmetric(one: str, other: str) -> None:
    assert equal_as_mathematics(one, other) == equal_as_mathematics(other, one)
    if one.strip():
        assert equal_as_mathematics(one, f" {one} ") == equal_as_mathematics(one, one)


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=60), st.text(max_size=60))
def test_no_text_raises(one: str, other: str) -> None:
    assert isinstance(equal_as_mathematics(one, other), bool)


@settings(deadline=None, max_examples=50)
@given(st.integers(-(10**30), 10**30), st.integers(1, 10**6), st.integers(1, 40))
def test_rational_numbers(above: int, below: int, scale: int) -> None:
    """A fraction equals itself in every spelling, and equals no neighbour."""
    text = rf"\frac{{{above}}}{{{below}}}"
    assert equal_as_mathematics(text, f"{above * scale}/{below * scale}")
    assert equal_as_mathematics(rf"-\frac{{{-above}}}{{{below}}}", text)
    assert not equal_as_mathematics(text, rf"\frac{{{above + 1}}}{{{below}}}")
    assert not equal_as_mathematics(text, rf"\frac{{{10**25 * above + 1}}}{{{10**25 * below}}}")


@pytest.mark.parametrize(("answer", "label"), [("34", "35"), ("-7.50", "-7.5"), ("123456789", "123456788")])
def test_plain_numbers_are_compared_without_a_parser(answer: str, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mathematics, "equal_answers")
    equal_as_mathematics(answer, label)
    with pytest.raises(NameError):
        equal_as_mathematics("x", "y")


def test_far_longer_answers_are_not_parsed() -> None:
    label, *answers = ("x^{" + "2}".rjust(length - 3) for length in (600, 1200, 1201))
    assert [equal_as_mathematics(answer, label) for answer in answers] == [True, False]
    assert equal_as_mathematics("x^{" + "2}".rjust(MAX_ANSWER - 3), "x^2"), "up to this length every answer is parsed"


def test_only_plain_integrals_go_to_the_library() -> None:
    integral, infinite = r"\int_0^1 x dx", r"\sum_{n=1}^{\infty} 2^{-n}"
    longest = integral.ljust(MAX_TEXT)
    assert all(map(may_read, (integral, infinite, longest, r"\int_0^1 x \mathrm{d} x")))
    others = (
        r"\int x dx",
        r"\sum_{n=1}^{9} n",
        longest + " ",
        integral + r"\gamma",
        integral + "+1234",
        integral + "!",
    )
    assert not any(map(may_read, others))


@pytest.mark.parametrize(
    ("op", "values", "expected"),
    [
        ("root", ("27/8", "3"), "3/2"),
        ("root", ("-32", "5"), "-2"),
        ("root", ("-4", "2"), None),
        ("root", ("26", "3"), None),
        ("root", (str(7**64), "64"), "7"),
        ("root", ("1", "65"), None),
        ("^", ("4/9", "-3/2"), "27/8"),
        ("^", ("-1", str(10**9 + 1)), "-1"),
        ("^", ("2", str(10**6)), None),
        ("mod", ("-7", "3"), "2"),
        ("gcd", ("12", "18", "8"), "2"),
        ("lcm", ("4", "6"), "12"),
        ("gcd", ("1/2", "3"), None),
        ("binom", ("6", "2"), "15"),
        ("binom", ("2", "6"), None),
        ("factorial", ("5",), "120"),
        ("factorial2", ("7",), "105"),
        ("factorial", ("5001",), None),
        ("abs", ("-1/2",), "1/2"),
        ("floor", ("-1/2",), "-1"),
        ("ceil", ("-1/2",), "0"),
        ("max", ("1", "3", "2"), "3"),
        ("min", ("3", "1", "2"), "1"),
        ("sin", ("0",), None),
    ],
)
def test_exact_values(op: str, values: tuple[str, ...], expected: str | None) -> None:
    tree = Node(op, tuple(number(Fraction(value)) for value in values))
    if expected is None:
        with pytest.raises(InexactError):
            exact(tree)
    else:
        assert exact(tree) == Fraction(expected)
