"""The value of a tree of arithmetic at a point, with as many digits as needed.

- Where it sits: `expressions` makes the trees, and `equality` compares their values.
- Invariant: nothing takes long, however large a number is written: a value beyond the limits is an UnreadError.

The same symbol has the same value in every tree. It is drawn from its name, so that verdicts are repeatable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from typing import Any

from slime.rollout.rewards.answers.exact import exact
from slime.rollout.rewards.answers.tokens import UnreadError
from slime.rollout.rewards.answers.trees import Node
from slime.rollout.rewards.answers.vocabulary import words

MAX_TERMS = 2000
"""The most terms of all sums and products in one evaluation together."""


@cache
def _drawn(name: str, point: int) -> tuple[Fraction, Fraction]:
    """Return a value between 0.2 and 4 for a symbol at a point, and one between -4 and 4."""
    digest = hashlib.sha256(f"{name}|{point}".encode("utf-8", "replace")).digest()
    unit = Fraction(int.from_bytes(digest[:12], "big"), 1 << 96)
    return Fraction(1, 5) + unit * Fraction(19, 5), 8 * unit - 4


class Evaluator:
    """Computes a tree's value with mpmath, at one point and with a given number of bits.

    `given` has the values of letters that are not drawn.
    """

    def __init__(
        self, context: Any, point: int, positive: bool, whole: frozenset[str], given: Mapping[str, Any] | None = None
    ) -> None:
        self.mp = context
        self.point = point
        self.positive = positive
        self.whole = whole
        self.bound: dict[str, Any] = {}
        self.terms = 0
        self.peak = 0
        self.given: Mapping[str, Any] = given or {}

    def value(self, node: Node) -> Any:
        method = getattr(self, "op_" + _METHODS.get(node.op, node.op), None)
        if method is None:
            raise UnreadError(f"{node.op} has no value")
        self.terms += 1
        if self.terms > 5 * MAX_TERMS:
            raise UnreadError("too many terms")
        value = method(node)
        if isinstance(value, list):
            return value
        if not self.mp.isfinite(value):
            raise UnreadError("no finite value")
        if value != 0:
            self.peak = max(self.peak, abs(self.size(value)))
            if self.peak > 1 << 60:
                raise UnreadError("too large")
        return value

    def size(self, value: Any) -> int:
        return int(self.mp.mag(value))

    def number(self, value: Fraction) -> Any:
        return self.mp.mpf(value.numerator) / value.denominator

    def scalar(self, node: Node) -> Any:
        value = self.value(node)
        if isinstance(value, list):
            raise UnreadError("a matrix where a number is needed")
        return value

    def real(self, node: Node) -> Any:
        value = self.scalar(node)
        if self.mp.im(value) != 0:
            raise UnreadError("complex where a real number is needed")
        return self.mp.re(value)

    def op_number(self, node: Node) -> Any:
        return self.number(node.value)

    def op_symbol(self, node: Node) -> Any:
        if node.name in self.bound:
            return self.bound[node.name]
        if node.name in self.given:
            return self.given[node.name]
        positive, either = _drawn(node.name, self.point)
        if node.name in self.whole:
            return self.mp.mpf(2 + int(positive * 1000) % 7)
        return self.number(positive if self.positive else either)

    def op_pi(self, node: Node) -> Any:
        return +self.mp.pi

    def op_e(self, node: Node) -> Any:
        return +self.mp.e

    def op_i(self, node: Node) -> Any:
        return self.mp.mpc(0, 1)

    def op_degree(self, node: Node) -> Any:
        return self.mp.pi / 180

    def op_neg(self, node: Node) -> Any:
        return _each(self.value(node.args[0]), lambda value: -value)

    def op_plus(self, node: Node) -> Any:
        return self._added(self.value(node.args[0]), self.value(node.args[1]))

    def _added(self, left: Any, right: Any) -> Any:
        if isinstance(left, list) != isinstance(right, list):
            raise UnreadError("a matrix and a number")
        if not isinstance(left, list):
            return left + right
        if len(left) != len(right) or len(left[0]) != len(right[0]):
            raise UnreadError("matrices of different shapes")
        return [[a + b for a, b in zip(one, two, strict=True)] for one, two in zip(left, right, strict=True)]

    def op_product(self, node: Node) -> Any:
        left, right = self.value(node.args[0]), self.value(node.args[1])
        if not isinstance(left, list):
            return _each(right, lambda value: left * value)
        if not isinstance(right, list):
            return _each(left, lambda value: value * right)
        if len(left[0]) != len(right):
            raise UnreadError("matrices that cannot be multiplied")
        columns = list(zip(*right, strict=True))
        return [[self.mp.fsum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in left]

    def op_quotient(self, node: Node) -> Any:
        below = self.scalar(node.args[1])
        if below == 0:
            raise UnreadError("a division by zero")
        return _each(self.value(node.args[0]), lambda value: value / below)

    def op_power(self, node: Node) -> Any:
        exponent = self.scalar(node.args[1])
        return self._power(self.scalar(node.args[0]), exponent)

    def _power(self, base: Any, exponent: Any) -> Any:
        if base == 0:
            if self.mp.im(exponent) != 0 or exponent <= 0:
                raise UnreadError("zero to that power")
            return self.mp.mpf(0)
        if exponent != 0 and self.size(exponent) + self.size(self.mp.mpf(abs(self.size(base)) + 1)) > 60:
            raise UnreadError("too large")
        return self.mp.power(base, exponent)

    def op_root(self, node: Node) -> Any:
        value, degree = self.scalar(node.args[0]), self.scalar(node.args[1])
        if degree == 0:
            raise UnreadError("a division by zero")
        odd = self.mp.im(degree) == 0 and degree == self.mp.floor(degree) and degree % 2 == 1
        if odd and self.mp.im(value) == 0 and value < 0:
            return -self._power(-value, 1 / degree)
        return self._power(value, 1 / degree)

    def op_factorial(self, node: Node) -> Any:
        value = self.real(node.args[0])
        if value < 0 or (value != 0 and self.size(value) > 50):
            raise UnreadError("a factorial out of range")
        return self.mp.fac2(value) if node.op == "factorial2" else self.mp.factorial(value)

    def op_binom(self, node: Node) -> Any:
        above, below = self.real(node.args[0]), self.real(node.args[1])
        if max(abs(above), abs(below)) > 10**6:
            raise UnreadError("too large")
        return self.mp.binomial(above, below)

    def op_abs(self, node: Node) -> Any:
        return abs(self.scalar(node.args[0]))

    def op_rounded(self, node: Node) -> Any:
        value = self.real(node.args[0])
        if value != 0 and self.size(value) > self.mp.prec // 2:
            raise UnreadError("too large to be rounded")
        return (self.mp.floor if node.op == "floor" else self.mp.ceil)(value)

    def op_choice(self, node: Node) -> Any:
        values = [self.real(arg) for arg in node.args]
        return max(values) if node.op == "max" else min(values)

    def op_divisor(self, node: Node) -> Any:
        return self.number(exact(node))

    def op_logarithm(self, node: Node) -> Any:
        value = self.scalar(node.args[0])
        if value == 0:
            raise UnreadError("the logarithm of zero")
        if node.op == "ln":
            return self.mp.log(value)
        base = self.scalar(node.args[1]) if node.op == "logb" else self.mp.mpf(10)
        below = self.mp.log(base) if base != 0 else 0
        if below == 0:
            raise UnreadError("a logarithm without a base")
        return self.mp.log(value) / below

    def op_function(self, node: Node) -> Any:
        value = self.scalar(node.args[0])
        if value != 0 and self.size(value) > 60:
            raise UnreadError("too large")
        if node.op in ("tan", "sec", "cot", "csc"):
            below = self.mp.sin(value) if node.op in ("cot", "csc") else self.mp.cos(value)
            if below == 0 or self.size(below) < -self.mp.prec // 2:
                raise UnreadError("a pole")
        name = node.op.replace("arc", "a")
        return getattr(self.mp, name)(value)

    def op_apply(self, node: Node) -> Any:
        """Evaluate an unknown function: some smooth function that its name decides."""
        total = self.mp.mpf(0)
        for index, arg in enumerate(node.args):
            value = self.scalar(arg)
            if value != 0 and self.size(value) > 60:
                raise UnreadError("too large")
            total += self.number(_drawn(node.name, 100 + index)[0]) * value
        return 2 + self.mp.cos(total + self.number(_drawn(node.name, 99)[0]))

    def op_matrix(self, node: Node) -> Any:
        return [[self.scalar(cell) for cell in row.args] for row in node.args]

    def op_det(self, node: Node) -> Any:
        rows = self.value(node.args[0])
        if not isinstance(rows, list) or len(rows) != len(rows[0]) or len(rows) > 6:
            raise UnreadError("no determinant")
        return self.mp.det(self.mp.matrix(rows))

    def op_mod(self, node: Node) -> Any:
        raise UnreadError("a remainder that is not of whole numbers")

    def op_series(self, node: Node) -> Any:
        body, lower, upper = node.args
        first, last = self.real(lower), self.real(upper)
        if first != self.mp.floor(first) or last != self.mp.floor(last) or last - first > MAX_TERMS:
            raise UnreadError("a sum without end")
        total = self.mp.mpf(node.op == "prod")
        outer = self.bound.get(node.name)
        for index in range(int(first), int(last) + 1):
            self.bound[node.name] = self.mp.mpf(index)
            term = self.scalar(body)
            total = total * term if node.op == "prod" else total + term
        self.bound.pop(node.name, None)
        if outer is not None:
            self.bound[node.name] = outer
        return total


_METHODS = {
    "+": "plus",
    "*": "product",
    "/": "quotient",
    "^": "power",
    "factorial2": "factorial",
    "floor": "rounded",
    "ceil": "rounded",
    "max": "choice",
    "min": "choice",
    "gcd": "divisor",
    "lcm": "divisor",
    **dict.fromkeys(("ln", "lg", "log", "logb"), "logarithm"),
    **dict.fromkeys(words("sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arccot exp"), "function"),
    "sum": "series",
    "prod": "series",
}


def _each(value: Any, change: Any) -> Any:
    return [[change(cell) for cell in row] for row in value] if isinstance(value, list) else change(value)
