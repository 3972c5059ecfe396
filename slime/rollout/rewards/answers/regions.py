r"""Inequalities, intervals and sets as regions of one variable, and whether two are the same region.

- Called by: `comparison`, for answers that are regions: `x<3`, `(-\infty,3)`, `\{x\mid x<3\}`, unions of them.
- Invariant: two regions are equal only if the ends of one are known (all its conditions are linear), and both agree at
  every end, close to it on both sides, between the ends and beyond them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from slime.rollout.rewards.answers.equality import BITS, context
from slime.rollout.rewards.answers.numerics import Evaluator
from slime.rollout.rewards.answers.parts import names_in
from slime.rollout.rewards.answers.structure import Answer, Chain, Many, Region, Value, Words
from slime.rollout.rewards.answers.tokens import UnreadError
from slime.rollout.rewards.answers.trees import Node

INFINITY = r"\infty"
POINTS = 8
"""The number of values of the other letters at which regions are compared."""
ORDER = frozenset({"<", "<=", ">", ">=", "!="})
_REAL = Value(Node("symbol", name="mathbb:R"))
_INTERVALS = frozenset({"()", "(]", "[)", "[]", "][", "]]", "[["})
_ALL_REAL = frozenset({("all", "real", "numbers"), ("all", "reals"), ("real", "numbers"), ("all", "real", "number")})


@dataclass(frozen=True, slots=True)
class Domain:
    """The real numbers for which `holds` is true; its finite ends, and whether these are all of them."""

    holds: Callable[[Any], bool]
    ends: tuple[Any, ...]
    explicit: bool
    variable: str | None = None


def is_region(answer: Answer) -> bool:
    """Return whether it can only be a region: an inequality, a union, an interval that is no pair of numbers."""
    if isinstance(answer, Region):
        return True
    if isinstance(answer, Chain):
        if answer.relations == ("in",):
            return is_region(answer.sides[1])
        return all(relation in ORDER for relation in answer.relations)
    if isinstance(answer, Many) and answer.kind == "tuple" and len(answer.items) == 2:
        return answer.brackets in _INTERVALS and (answer.brackets != "()" or any(map(_infinite, answer.items)))
    return answer == _REAL or (isinstance(answer, Words) and answer.parts in _ALL_REAL)


def same_region(one: Answer, other: Answer) -> bool | None:
    """Return whether both are the same set of real numbers; None if that cannot be decided."""
    context().prec = BITS
    try:
        names = {variable for variable in (variable_of(one), variable_of(other)) if variable}
        if len(names) > 1:
            return None
        variable = names.pop() if names else None
        found = 0
        for point in range(POINTS if _has_letters(one, variable) or _has_letters(other, variable) else 1):
            ours, theirs = _domain(one, variable, point), _domain(other, variable, point)
            if not (ours.explicit or theirs.explicit):
                return None
            places = list(_places([*ours.ends, *theirs.ends]))
            inside = [ours.holds(x) for x in places]
            if inside != [theirs.holds(x) for x in places]:
                return False
            found += any(inside)
        return True if found or point == 0 else None
    except (UnreadError, ArithmeticError, ValueError):
        return None


def _has_letters(answer: Answer, variable: str | None) -> bool:
    """Return whether it has letters other than the variable: the region depends on them, and may be empty by chance."""
    if isinstance(answer, Region):
        if answer.op == "builder":
            return _has_letters(answer.parts[1], variable_of(answer.parts[1]))
        return any(_has_letters(part, variable) for part in answer.parts)
    return bool(names_in(answer) - {variable, INFINITY})


def variable_of(answer: Answer) -> str | None:
    """Return the variable of an inequality; None if there is only a set (an interval, `x\\in S`)."""
    if isinstance(answer, Region) and answer.op != "builder":
        names = {variable_of(part) for part in answer.parts} - {None}
        if len(names) > 1:
            raise UnreadError("conditions for several variables")
        return names.pop() if names else None
    if not isinstance(answer, Chain) or answer.relations == ("in",):
        return None
    plain = [side.node.name for side in answer.sides if isinstance(side, Value) and side.node.op == "symbol"]
    plain = [name for name in plain if name != INFINITY]
    middle = answer.sides[1]
    if len(answer.sides) == 3 and isinstance(middle, Value) and middle.node.op == "symbol":
        return middle.node.name
    names = frozenset[str]().union(*(side.node.names() for side in answer.sides if isinstance(side, Value)))
    if len(names - {INFINITY}) == 1:
        return next(iter(names - {INFINITY}))
    if not plain:
        raise UnreadError("no variable")
    return plain[0]


def _infinite(answer: Answer) -> bool:
    if not isinstance(answer, Value):
        return False
    node = answer.node.args[0] if answer.node.op == "neg" else answer.node
    return node == Node("symbol", name=INFINITY)


def _real(answer: Answer, given: dict[str, Any], point: int) -> Any:
    """Return the real value of a side, infinity included, with the letters of this point.

    Raises:
        UnreadError: there is no such value.
    """
    if not isinstance(answer, Value):
        raise UnreadError("no number")
    if _infinite(answer):
        return -context().inf if answer.node.op == "neg" else context().inf
    return Evaluator(context(), point, True, frozenset(), given).real(answer.node)


def _places(ends: list[Any]) -> Iterator[Any]:
    """Yield places at which to compare two regions: ends, close to them, between and beyond them, and others."""
    mp = context()
    ordered = sorted(end for end in ends if mp.isfinite(end))
    for end in ordered:
        step = max(abs(end), 1) * mp.mpf("1e-9")
        yield from (end, end - step, end + step)
    for left, right in pairwise(ordered):
        yield (left + right) / 2
    if ordered:
        yield from (ordered[0] - 1, ordered[-1] + 1)
    yield from (mp.mpf(index * 37 % 101 - 50) / 7 for index in range(40))
    yield from (mp.mpf(place) for place in (0, 1, -1, 2, -2, "1e6", "-1e6", "1e-3", "-1e-3", "0.5", "-0.5"))


def _domain(answer: Answer, variable: str | None, point: int) -> Domain:
    if isinstance(answer, Region):
        return _combined(answer, variable, point)
    if isinstance(answer, Chain):
        if answer.relations in (("in",), ("notin",)):
            inside = _domain(answer.sides[1], None, point)
            holds = inside.holds
            return (
                inside if answer.relations[0] == "in" else Domain(lambda x: not holds(x), inside.ends, inside.explicit)
            )
        return _chain(answer, variable or variable_of(answer), point)
    if isinstance(answer, Words) or (isinstance(answer, Value) and answer.node.op == "symbol"):
        if is_region(answer):
            return Domain(lambda x: True, (), True)
        raise UnreadError("no region")
    if not isinstance(answer, Many) or answer.dots >= 0:
        raise UnreadError("no region")
    if answer.kind == "tuple":
        return _interval(answer, point)
    values = [_real(item, {}, point) for item in answer.items]
    return Domain(lambda x: any(_same(x, value) for value in values), tuple(values), True)


def _interval(answer: Many, point: int) -> Domain:
    if len(answer.items) != 2 or answer.brackets not in _INTERVALS:
        raise UnreadError("no interval")
    low, high = (_real(item, {}, point) for item in answer.items)
    if not low < high and names_in(answer):
        return Domain(lambda x: False, (), True)  # its ends have letters: it is empty at this point
    if not low < high:
        raise UnreadError("an interval from right to left")
    if any(_infinite(item) and bracket in "[]" for item, bracket in zip(answer.items, answer.brackets, strict=True)):
        raise UnreadError("infinity as a member of an interval")
    with_low, with_high = answer.brackets[0] == "[", answer.brackets[1] == "]"

    def holds(x: Any) -> bool:
        if _same(x, low) or _same(x, high):
            return with_low if _same(x, low) else with_high
        return bool(low < x < high)

    return Domain(holds, (low, high), True)


def _same(x: Any, y: Any) -> bool:
    return bool(
        x == y
        or (
            context().isfinite(x)
            and context().isfinite(y)
            and abs(x - y) <= context().ldexp(max(abs(x), abs(y), 1), -150)
        )
    )


def _combined(answer: Region, variable: str | None, point: int) -> Domain:
    if answer.op == "builder":
        head, condition = answer.parts
        if isinstance(head, Chain) and head.relations == ("in",) and head.sides[1] == _REAL:
            head = head.sides[0]
        if not isinstance(head, Value) or head.node.op != "symbol":
            raise UnreadError("a set of something else than a variable")
        inside = _domain(_without_membership(condition, head), head.node.name, point)
        return Domain(inside.holds, inside.ends, inside.explicit)
    parts = [_domain(part, variable, point) for part in answer.parts]
    tests = [part.holds for part in parts]
    holds: Callable[[Any], bool]
    if answer.op in ("cup", "or"):
        holds = lambda x: any(test(x) for test in tests)  # noqa: E731
    elif answer.op in ("cap", "and"):
        holds = lambda x: all(test(x) for test in tests)  # noqa: E731
    else:
        holds = lambda x: tests[0](x) and not any(test(x) for test in tests[1:])  # noqa: E731
    ends = tuple(end for part in parts for end in part.ends)
    return Domain(holds, ends, all(part.explicit for part in parts))


def _without_membership(condition: Answer, head: Value) -> Answer:
    """Return the conditions without `x \\in \\mathbb{R}`."""
    real = Chain(("in",), (head, _REAL))
    if isinstance(condition, Many | Region):
        parts = tuple(
            part for part in (condition.items if isinstance(condition, Many) else condition.parts) if part != real
        )
        if isinstance(condition, Region) and condition.op == "or":
            return condition
        return parts[0] if len(parts) == 1 else Region("and", parts)
    return condition


def _chain(answer: Chain, variable: str | None, point: int) -> Domain:
    if variable is None or not all(relation in ORDER or relation == "=" for relation in answer.relations):
        raise UnreadError("no inequality")
    pairs = list(zip(answer.relations, answer.sides, answer.sides[1:], strict=False))

    def difference(left: Answer, right: Answer, x: Any) -> Any:
        if _infinite(left) or _infinite(right):
            return _real(left, {}, point) if _infinite(left) else -_real(right, {}, point)
        return _real(left, {variable: x}, point) - _real(right, {variable: x}, point)

    def holds(x: Any) -> bool:
        for relation, left, right in pairs:
            try:
                gap = difference(left, right, x)
            except (UnreadError, ArithmeticError, ValueError):
                return False  # an expression without a value at this place fulfils no condition
            if not _fulfilled(relation, gap):
                return False
        return True

    ends: list[Any] = []
    explicit = True
    for _, left, right in pairs:
        if _infinite(left) or _infinite(right):
            continue
        try:
            at_0, at_1, at_2 = (difference(left, right, context().mpf(x)) for x in (0, 1, 2))
        except (UnreadError, ArithmeticError, ValueError):
            explicit = False
            continue
        linear = _same(at_2 - at_1, at_1 - at_0) and _linear(left, variable) and _linear(right, variable)
        if linear and not _same(at_0, at_1):
            ends.append(-at_0 / (at_1 - at_0))
        explicit = explicit and linear
    return Domain(holds, tuple(ends), explicit, variable)


def _linear(answer: Answer, variable: str) -> bool:
    """Return whether the variable is only in sums and products with numbers (`|x-1|` is linear at three points)."""

    def plain(node: Node) -> bool:
        if variable not in node.names():
            return True
        if node.op == "/":
            return plain(node.args[0]) and variable not in node.args[1].names()
        return node.op in ("symbol", "+", "neg", "*") and all(plain(arg) for arg in node.args)

    return isinstance(answer, Value) and plain(answer.node)


def _fulfilled(relation: str, gap: Any) -> bool:
    if _same(gap, 0):
        return relation in ("<=", ">=", "=")
    return relation == "!=" or relation in (("<", "<=") if gap < 0 else (">", ">="))
