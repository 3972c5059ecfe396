r"""Equality of two trees of arithmetic.

- Called by: `comparison` asks for equality; `numerics` computes the values.
- Invariant: no tolerance is absolute, so no small value is taken for zero (`1/2004!` is not `1/2006!`). A value that
  cannot be computed within the limits is not equal to anything.

Rational values are compared exactly. Others are compared at points with at least 70 digits. Two trees are equal if they
agree at every point where both are real, and at the positive points also where they are complex. (`\ln ab` and
`\ln a + \ln b` differ by a branch where both letters are negative, and count as equal.)
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from typing import Any

from slime.rollout.rewards.answers.exact import InexactError, exact
from slime.rollout.rewards.answers.numerics import Evaluator
from slime.rollout.rewards.answers.tokens import UnreadError
from slime.rollout.rewards.answers.trees import Node

BITS = 240
MAX_BITS = 12_000
"""The most bits of an evaluation. It uses over twice the bits of its largest value, so rounding loses nothing."""
POINTS = 6
"""The number of positive points, and of points of either sign."""
ROUNDED_DIGITS = 7
"""Significant digits from which two decimals are equal if the shorter one is the longer one, rounded."""
CLOSED_DIGITS = 15
"""Significant digits from which a decimal equals a closed form (`\\sqrt{17}`) that rounds to it."""


@cache
def context() -> Any:
    """Return an mpmath context of our own, whose precision no other code changes."""
    from mpmath.ctx_mp import MPContext

    return MPContext()


def equal_trees(one: Node, other: Node) -> bool:
    """Return whether two expressions have the same value, for every value of their symbols."""
    if one == other:
        return True
    names = one.names() | other.names()
    try:
        if not names:
            return _equal_closed(one, other)
        return _equal_at_points(one, other, names)
    except (UnreadError, ArithmeticError, ValueError):
        return False


def _equal_closed(one: Node, other: Node) -> bool:
    ours, theirs = _rational(one), _rational(other)
    if ours is not None and theirs is not None:
        return ours == theirs or _rounded(one, ours, other, theirs)
    if ours is not None or theirs is not None:
        literal = one if ours is not None else other
        if decimals_of(literal) >= CLOSED_DIGITS:
            return _rounds_to(literal, other if ours is not None else one)
    return _agree(one, other, 0, positive=True, whole=frozenset()) is True


def _rational(node: Node) -> Fraction | None:
    try:
        return exact(node)
    except InexactError:
        return None


def decimals_of(node: Node) -> int:
    r"""Return the significant digits of a decimal as written (`-0.5`, `1.5\cdot10^{-7}`); -1 for everything else."""
    if node.op == "neg":
        return decimals_of(node.args[0])
    if node.op == "*" and node.args[1].op == "^" and node.args[1].args[0].value == 10:
        return decimals_of(node.args[0])
    return node.decimals if node.op == "number" else -1


def _half_unit(value: Fraction, digits: int) -> Fraction:
    """Return half a unit in the last place of a decimal with `digits` significant digits."""
    magnitude, size = 0, abs(value)
    while size >= 10:
        size, magnitude = size / 10, magnitude + 1
    while 0 < size < 1:
        size, magnitude = size * 10, magnitude - 1
    return Fraction(10) ** (magnitude - digits + 1) / 2


def _rounded(one: Node, ours: Fraction, other: Node, theirs: Fraction) -> bool:
    """Return whether two decimals of many digits are one number rounded differently, or a decimal is a fraction."""
    digits = (decimals_of(one), decimals_of(other))
    if min(digits) >= ROUNDED_DIGITS:
        shorter, fewer = (ours, digits[0]) if digits[0] < digits[1] else (theirs, digits[1])
        return digits[0] != digits[1] and abs(ours - theirs) <= _half_unit(shorter, fewer)
    if max(digits) >= CLOSED_DIGITS and min(digits) < 0:
        literal, fraction = (ours, theirs) if digits[0] > digits[1] else (theirs, ours)
        below = fraction.denominator
        while below % 10 == 0 or below % 2 == 0 or below % 5 == 0:
            below //= 2 if below % 2 == 0 else 5
        return below != 1 and abs(literal - fraction) <= _half_unit(literal, max(digits))
    return False


def _rounds_to(literal: Node, closed: Node) -> bool:
    mp = context()
    mp.prec = BITS
    value = Evaluator(mp, 0, True, frozenset()).real(closed)
    written = exact(literal)
    half = _half_unit(written, decimals_of(literal))
    difference = abs(value - mp.mpf(written.numerator) / written.denominator)
    return bool(difference <= mp.mpf(half.numerator) / half.denominator)


def _equal_at_points(one: Node, other: Node, names: frozenset[str]) -> bool:
    whole = _limits_of_sums(one) | _limits_of_sums(other)
    for positive in (True, False):
        found = 0
        for point in range(POINTS):
            verdict = _agree(one, other, point, positive, whole)
            if verdict is False:
                return False
            found += verdict is True
        if positive and found < POINTS // 2:
            return False
    return True


def _limits_of_sums(node: Node) -> frozenset[str]:
    """Return the symbols that have to be whole numbers: those in the limits of a sum or product."""
    inner = frozenset[str]().union(*(_limits_of_sums(arg) for arg in node.args))
    if node.op in ("sum", "prod"):
        return inner | node.args[1].names() | node.args[2].names()
    return inner


def _agree(one: Node, other: Node, point: int, positive: bool, whole: frozenset[str]) -> bool | None:
    """Return whether both have the same value at a point; None if one has none, or a complex one at a signed point."""
    try:
        bits, values = _values((one, other), point, positive, whole, BITS)
        if not positive and not all(_is_real(value) for value in values):
            return None
        cells = list(_cells(*values))
        if all(_close(ours, theirs, bits) for ours, theirs in cells):
            return True
        if any(_far(ours, theirs, bits) for ours, theirs in cells):
            return False
        # The difference is of the size of rounding errors. With twice the digits it shrinks if it is one.
        more, better = _values((one, other), point, positive, whole, 2 * bits)
        pairs = zip(cells, _cells(*better), strict=True)
        return all(_close(*new, more) or _shrinks(old, new, bits) for old, new in pairs)
    except (UnreadError, ArithmeticError, ValueError):
        return None


def _values(
    nodes: tuple[Node, ...], point: int, positive: bool, whole: frozenset[str], bits: int
) -> tuple[int, list[Any]]:
    """Return the values of the nodes, and the bits used: enough for the largest and the smallest of them."""
    mp = context()
    while True:
        mp.prec = bits
        evaluator = Evaluator(mp, point, positive, whole)
        values = [evaluator.value(node) for node in nodes]
        needed = BITS + 2 * evaluator.peak
        if needed > MAX_BITS:
            raise UnreadError("needs too many digits")
        if needed <= bits or evaluator.peak < BITS // 4:
            return bits, values
        bits = needed


def _cells(ours: Any, theirs: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(ours, list) != isinstance(theirs, list):
        raise UnreadError("a matrix and a number")
    if not isinstance(ours, list):
        yield ours, theirs
        return
    if len(ours) != len(theirs) or len(ours[0]) != len(theirs[0]):
        yield 0, 1
        return
    for row, other_row in zip(ours, theirs, strict=True):
        yield from zip(row, other_row, strict=True)


def _is_real(value: Any) -> bool:
    return isinstance(value, list) or context().im(value) == 0


def _close(ours: Any, theirs: Any, bits: int) -> bool:
    return bool(abs(ours - theirs) <= context().ldexp(max(abs(ours), abs(theirs)), -bits // 2))


def _far(ours: Any, theirs: Any, bits: int) -> bool:
    return bool(abs(ours - theirs) > context().ldexp(1, -bits // 3))


def _shrinks(old: tuple[Any, Any], new: tuple[Any, Any], bits: int) -> bool:
    before, after = abs(old[0] - old[1]), abs(new[0] - new[1])
    return bool(after <= context().ldexp(before, -bits // 2))


def proportional(one: Node, other: Node, positive: bool) -> bool:
    """Return whether one is a number (with `positive`, a positive one) times the other, so both vanish together."""
    names = one.names() | other.names()
    if not names:
        return False
    ratio: Any = None
    found = 0
    for signs in (True, False):
        for point in range(POINTS):
            try:
                bits, values = _values((one, other), point, signs, frozenset(), BITS)
            except (UnreadError, ArithmeticError, ValueError):
                continue
            ours, theirs = values
            if isinstance(ours, list) or isinstance(theirs, list) or not ours or not theirs:
                return False
            if not signs and not (_is_real(ours) and _is_real(theirs)):
                continue
            quotient = ours / theirs
            if ratio is not None and not _close(ratio, quotient, bits):
                return False
            ratio = quotient
            found += 1
    if ratio is None or found < POINTS // 2 or context().im(ratio) != 0:
        return False
    return not positive or bool(ratio > 0)
