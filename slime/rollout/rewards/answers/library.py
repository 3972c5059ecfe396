r"""Definite integrals and infinite sums, as math-verify's parser (latex2sympy2_extended) reads them.

- Called by: `comparison`, for an expression that `expressions` does not read.
- Invariant: the parser's reading is used only if all its letters are bound, so that it has dropped or joined none. It
  is used only for a short text of a few known commands and small numbers, so that neither it nor sympy takes long.

Why the parser does not read the whole answer: its normalization drops or joins letters (`R` and `r`, letters of units).
It reads `\sin x\cdot y` as the sine of a product and `a/bc` as `a/(bc)`, computes `gcd(a,b)` of two letters as 1, and
takes 2.7 s for a sum of 200 terms.
"""

from __future__ import annotations

import re
from typing import Any

from slime.rollout.rewards.answers.equality import context
from slime.rollout.rewards.answers.numerics import Evaluator
from slime.rollout.rewards.answers.tokens import UnreadError
from slime.rollout.rewards.answers.trees import Node
from slime.rollout.rewards.answers.vocabulary import words

DIGITS = 30
MAX_TEXT = 120
_TOLERANCE = "1e-18"
_READS = frozenset(words(r"\int \sum \infty \frac \sqrt \sin \cos \tan \ln \exp \pi \cdot \times"))
_RISKS = re.compile(r"\d{4}|!|\^\s*\{[^{}]*\^|\^\s*\{?\d\d|\.\d{4}")
_UPRIGHT = re.compile(r"\\(?:mathrm|text|rm)\s*\{\s*([de])\s*\}")


def may_read(text: str) -> bool:
    """Return whether it is an integral or sum that is short and plain enough."""
    text = _UPRIGHT.sub(r" \1", text)
    commands = set(re.findall(r"\\[A-Za-z]+", text))
    closed = r"\int_" in text or (r"\sum_" in text and r"\infty" in text)
    return closed and commands <= _READS and len(text) <= MAX_TEXT and _RISKS.search(text) is None


def equal_to_series(text: str, node: Node) -> bool:
    """Return whether the integral or infinite sum in LaTeX has the value of an expression without letters."""
    mp = context()
    mp.prec = 240
    try:
        if node.names():
            return False
        expected = Evaluator(mp, 0, True, frozenset()).scalar(node)
        value = _value(text)
    except (UnreadError, ArithmeticError, ValueError, TypeError):
        return False
    return bool(abs(value - expected) <= mp.mpf(_TOLERANCE) * max(abs(expected), abs(value)))


def _value(text: str) -> Any:
    from latex2sympy2_extended import latex2sympy
    from sympy import Expr, Float, Rational

    try:
        expression = latex2sympy(_UPRIGHT.sub(r" \1", text), normalization_config=None)
    except Exception as error:  # the parser raises Exception itself for a text that it cannot read
        raise UnreadError(f"math-verify's parser: {error}") from error
    if not isinstance(expression, Expr) or expression.free_symbols:
        raise UnreadError("no expression, or a letter that nothing binds")
    value = expression.evalf(DIGITS)
    if not isinstance(value, Float | Rational):
        raise UnreadError("no real number")
    return context().mpf(str(value))
