r"""Lists with dots: `1,2,\ldots,10`.

- Called by: `comparison`, to learn what a list with dots holds.
- Invariant: dots are read only if the numbers before and after them are in arithmetic progression.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

from slime.rollout.rewards.answers.exact import exact
from slime.rollout.rewards.answers.structure import Many, Value
from slime.rollout.rewards.answers.tokens import UnreadError
from slime.rollout.rewards.answers.units import NO_UNIT


def progression(many: Many) -> tuple[Fraction, Fraction, Fraction | None] | None:
    """Return first number, step and last number (None if infinite) of a list; None if it is no progression."""
    numbers: list[Fraction] = []
    for item in many.items:
        if not isinstance(item, Value) or item.unit != NO_UNIT:
            return None
        try:
            numbers.append(exact(item.node))
        except UnreadError:
            return None
    before = numbers if many.dots < 0 else numbers[: many.dots]
    after = [] if many.dots < 0 else numbers[many.dots :]
    if len(before) < 2:
        return None
    step = before[1] - before[0]
    steps = [right - left for row in (before, after) for left, right in pairwise(row)]
    if step == 0 or any(each != step for each in steps):
        return None
    if not after:
        return before[0], step, before[-1] if many.dots < 0 else None
    count = (after[0] - before[-1]) / step
    if count.denominator != 1 or count < 1:
        return None
    return before[0], step, after[-1]
