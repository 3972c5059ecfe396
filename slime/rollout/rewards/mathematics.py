r"""Answers as mathematics: decide whether an answer means the same as the label. `--rm-type math` reads the last box.

- Called by: `reward` finds `math` in the table of types; `deepscaler` and `dapo` score with `mathematics_score` and
  `is_right`.
- Invariant: nothing that the model wrote is evaluated as code. `answers` reads it with a grammar of its own, and leaves
  integrals and infinite sums to math-verify's LaTeX parser. docs/rewards.md lists what counts as equal.
"""

from __future__ import annotations

import re
from decimal import Decimal

from slime.config.labels import stated_answer
from slime.config.reward_types import GRAMMAR_REMEDY, grammar_fault
from slime.core.boxes import Answer, boxed, last_boxed
from slime.rollout.rewards.answers.comparison import equal_answers
from slime.rollout.rewards.reward import Reward, against_label

MAX_ANSWER = 1000
"""The most characters of an answer that is read as mathematics; longer answers are compared as text."""

KNOWN = (
    ("0.5", r"\frac{1}{2}", True),
    (r"\sqrt{8}", r"2\sqrt{2}", True),
    (r"\frac{\pi}{4}", r"0.25\pi", True),
    (r"\frac{1}{3}", r"\frac{1}{2}", False),
    ("x+1", "x+2", False),
    ("R^2-r^2", "0", False),
    (r"\pi r^2 h", r"\pi r^2", False),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}", False),
    ("x<3", r"(-\infty,3)", True),
    (r"1,2,\ldots,10", r"1,2,3,\ldots,10", True),
    (r"\int_0^1 x dx", r"\frac{1}{2}", True),
)
"""Answers, labels and whether they are equal: a worker starts only if it reaches these verdicts."""

_NUMBER = re.compile(r"[+-]?[0-9]{1,400}(?:\.[0-9]{1,400})?")
_FEW_DIGITS = 6
"""Two decimals with at most this many digits are equal only if they are the same number, however they were rounded."""


def equal_as_mathematics(answer: str, label: str) -> bool:
    r"""Return whether both mean the same; `label` may be plain (`34`), LaTeX (`\frac{1}{2}`) or hold a \boxed{...}.

    An answer of more than MAX_ANSWER characters (and more than twice the other's) is compared as text.
    """
    answer, label = answer.strip(), (last_boxed(label) or label).strip()
    if not answer or not label:
        return False
    if _NUMBER.fullmatch(answer) and _NUMBER.fullmatch(label):
        if Decimal(answer) == Decimal(label):
            return True
        if min(len(answer), len(label)) <= _FEW_DIGITS or "." not in answer or "." not in label:
            return False
    if max(len(answer), len(label)) > max(MAX_ANSWER, 2 * min(len(answer), len(label))):
        return False
    return equal_answers(answer, label)


def mathematics_score(answer: Answer | None, label: str) -> float:
    """Return 1 if there is an answer that equals the label as mathematics, else 0."""
    return float(answer is not None and is_right(answer, label))


def is_right(answer: Answer, label: str) -> bool:
    r"""Return whether the answer equals the label as mathematics.

    Several boxes are read as a list. They are right if the list is the label, or if each box is (`\boxed{\frac12}` or
    `\boxed{0.5}`); `\boxed{3}` and `\boxed{5}` is not 5.

    Raises:
        ValueError: the label has GSM8K's form, but no answer.
    """
    label = stated_answer(label)
    if equal_as_mathematics(answer.text, label):
        return True
    joined = ", ".join(answer.parts)
    if joined != answer.text and answer.parts and equal_as_mathematics(joined, label):
        return True
    return bool(answer.parts) and all(equal_as_mathematics(part, label) for part in answer.parts)


def warm_up() -> None:
    """Load all parsers, so that no sample's time limit includes that, and check them with the known verdicts.

    Raises:
        RuntimeError: the installed ANTLR runtime is not the tested one, or a known verdict comes out wrong.
    """
    fault = grammar_fault()
    if fault is not None:
        raise RuntimeError(f"{fault}; {GRAMMAR_REMEDY}")
    for answer, label, equal in KNOWN:
        if equal_answers(answer, label) != equal:
            rule = f"{answer} is found {'unlike' if equal else 'equal to'} {label}: a parser does not work here"
            raise RuntimeError(
                f"{rule}; pip install --force-reinstall latex2sympy2_extended mpmath, and {GRAMMAR_REMEDY}"
            )


REWARD = Reward(read=boxed, score=against_label(mathematics_score))
