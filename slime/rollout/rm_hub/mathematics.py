r"""Answers as mathematics: whether one means the same as the label.

Path: the rules that compare answers (`deepscaler`, `math`, `dapo`, the `boxed_` prefix) call these. Invariant: nothing
that the model wrote is evaluated as code: answers are parsed as LaTeX by a grammar (math-verify's expression parser,
which uses eval, is left out).
"""

from __future__ import annotations

import re
from decimal import Decimal

from slime.config.grammar import REMEDY, grammar_fault
from slime.core.boxes import last_boxed

MAX_ANSWER = 1000
"""Characters of an answer that is still parsed: a degenerate one of thousands takes the grammar a minute."""

KNOWN = (
    ("0.5", r"\frac{1}{2}", True),
    (r"\sqrt{8}", r"2\sqrt{2}", True),
    (r"\frac{\pi}{4}", r"0.25\pi", True),
    (r"\frac{1}{3}", r"\frac{1}{2}", False),
    ("x+1", "x+2", False),
)
"""Answers, labels and whether they are equal: a worker starts only if it gives these verdicts."""

_SEPARATED = re.compile(r"[+-]?\d{1,3}(?:(?:\\[, ;:]|~| )\d{3})+(?:\.\d+)?")
"""Thousands set apart by a space of LaTeX: `10\\,000`. (Commas are math-verify's.)"""
_SPACE = re.compile(r"\\[, ;:]|~| ")
_NUMBER = re.compile(
    r"(?P<digits>[+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400}))"
    r"(?:(?:[eE]|\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*(?P<brace>\{)?\s*)(?P<power>[+-]?\d{1,3})(?(brace)\s*\}))?"
)
_TOLERANCE = Decimal("1e-6")
"""Of two numbers with a fraction: absolute, as math-verify has it, and relative below 1, where it would take all that
is small for the same."""


def equal_as_mathematics(answer: str, label: str) -> bool:
    r"""Whether both mean the same; `label` may be plain (`34`), LaTeX (`\frac{1}{2}`) or hold a \boxed{...}.

    An answer of more than MAX_ANSWER characters (and more than twice the label's) is compared as text.
    """
    answer, label = _plain(answer), _plain(last_boxed(label) or label)
    if not answer or not label:
        return False
    if answer == label:
        return True
    ours, theirs = _number(answer), _number(label)
    if ours is not None and theirs is not None:
        return _same_number(ours, theirs)
    return len(answer) <= max(MAX_ANSWER, 2 * len(label)) and _verify(answer, label)


def warm_up() -> None:
    """Load math-verify and make its grammar, so that no sample's time limit pays for it, and check that it can tell.

    Raises:
        RuntimeError: another ANTLR runtime is installed than verdicts were tested with, or a known verdict is wrong.
    """
    fault = grammar_fault()
    if fault is not None:
        raise RuntimeError(f"{fault}; {REMEDY}")
    for answer, label, equal in KNOWN:
        if _verify(answer, label) != equal:
            rule = (
                f"math-verify finds {answer} {'unlike' if equal else 'equal to'} {label}: its parser does not work here"
            )
            raise RuntimeError(f"{rule}; pip install --force-reinstall math-verify latex2sympy2_extended, and {REMEDY}")


def _plain(text: str) -> str:
    text = text.strip()
    text = text[:-1].rstrip() if text.endswith(".") else text
    text = text.strip("$").strip() if text.startswith("$") and text.endswith("$") else text
    return _SPACE.sub("", text) if _SEPARATED.fullmatch(text) else text


def _number(text: str) -> Decimal | None:
    """A decimal number, also as `1.5e-7` or `1.5\\times 10^{-7}`; None where it is anything else."""
    match = _NUMBER.fullmatch(text)
    return None if match is None else Decimal(f"{match['digits']}e{match['power'] or 0}")


def _same_number(ours: Decimal, theirs: Decimal) -> bool:
    if ours == theirs:
        return True
    if ours == ours.to_integral_value() or theirs == theirs.to_integral_value():
        return False
    return abs(ours - theirs) <= _TOLERANCE * min(Decimal(1), max(abs(ours), abs(theirs)))


def _verify(answer: str, label: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    # math-verify's own time limits use signals; the worker's owner has a limit that also ends what ignores signals.
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    parsed_label, parsed_answer = (
        parse(rf"\boxed{{{text}}}", extraction_config=config, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        for text in (label, answer)
    )
    return bool(verify(parsed_label, parsed_answer, timeout_seconds=None))
