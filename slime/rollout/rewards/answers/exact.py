"""The value of a tree of arithmetic as a fraction, if it is rational.

- Called by: `equality` and `numerics`.
- Invariant: nothing takes long, because a value beyond EXACT_BITS is not computed.
"""

from __future__ import annotations

import math
from fractions import Fraction

from slime.rollout.rewards.answers.tokens import UnreadError
from slime.rollout.rewards.answers.trees import Node

EXACT_BITS = 1 << 16
"""The most bits of the numerator or denominator of an exact value."""


class InexactError(UnreadError):
    """The value is not rational, or too large to be computed exactly."""


def exact(node: Node) -> Fraction:
    """Return the rational value of a tree.

    Raises:
        InexactError: the value is not known to be rational, or takes more than EXACT_BITS.
        UnreadError: there is no value (a division by zero).
    """
    if node.op == "number":
        return node.value
    if node.op == "neg":
        return -exact(node.args[0])
    if node.op not in ("+", "*", "/", "^", "factorial", "factorial2", "binom", "abs", "root", "gcd", "lcm", "mod"):
        if node.op in ("floor", "ceil", "max", "min"):
            return _exact_choice(node)
        raise InexactError(node.op)
    values = [exact(arg) for arg in node.args]
    return _bounded(_exact_operation(node.op, values))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > EXACT_BITS:
        raise InexactError("too large")
    return value


def _exact_choice(node: Node) -> Fraction:
    values = [exact(arg) for arg in node.args]
    if node.op in ("max", "min"):
        return max(values) if node.op == "max" else min(values)
    return Fraction(math.floor(values[0]) if node.op == "floor" else math.ceil(values[0]))


def _exact_operation(op: str, values: list[Fraction]) -> Fraction:
    first, second = values[0], values[-1]
    if op == "+":
        return first + second
    if op == "*":
        return first * second
    if op == "/":
        if second == 0:
            raise UnreadError("a division by zero")
        return first / second
    if op == "^":
        return _exact_power(first, second)
    if op == "abs":
        return abs(first)
    if op == "root":
        return _exact_root(first, second)
    if any(value.denominator != 1 for value in values):
        raise InexactError("not of whole numbers")
    whole, other = first.numerator, second.numerator
    if op == "mod":
        if other == 0:
            raise UnreadError("a division by zero")
        return Fraction(whole % other)
    if op in ("gcd", "lcm"):
        combine = math.gcd if op == "gcd" else math.lcm
        return Fraction(combine(*(value.numerator for value in values)))
    if op == "binom":
        if not 0 <= other <= whole <= 5000:
            raise InexactError("too large")
        return Fraction(math.comb(whole, other))
    if not 0 <= whole <= 5000:
        raise InexactError("too large")
    return Fraction(math.factorial(whole) if op == "factorial" else math.prod(range(whole, 0, -2)))


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        return _exact_root(_exact_power(base, Fraction(exponent.numerator)), Fraction(exponent.denominator))
    if base == 0 and exponent <= 0:
        raise UnreadError("zero to that power")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if base not in (-1, 0, 1) and bits * abs(exponent) > EXACT_BITS:
        raise InexactError("too large")
    power = abs(exponent.numerator) % 2 + 2 if base in (-1, 1, 0) else exponent.numerator
    return base**power


def _exact_root(value: Fraction, degree: Fraction) -> Fraction:
    if degree.denominator != 1 or not 1 <= degree <= 64 or (value < 0 and degree % 2 == 0):
        raise InexactError("not a whole root")
    size = degree.numerator
    above, below = _whole_root(abs(value.numerator), size), _whole_root(value.denominator, size)
    return Fraction(above, below) * (-1 if value < 0 else 1)


def _whole_root(value: int, degree: int) -> int:
    if degree == 2:
        root = math.isqrt(value)
    elif value.bit_length() > 4000:
        raise InexactError("too large")
    else:
        root = 1 << (value.bit_length() // degree + 1)
        while True:  # Newton's iteration from above
            following = ((degree - 1) * root + value // root ** (degree - 1)) // degree
            if following >= root:
                break
            root = following
    if root**degree != value:
        raise InexactError("irrational")
    return root
