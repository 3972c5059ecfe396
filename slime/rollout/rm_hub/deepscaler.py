r"""The deepscaler rule: the last \boxed{...} after the last </think> equals the label as mathematics -> 1, else 0.

Path: `registry` reads the answer with it; the evaluation's metric `format` counts the responses that have one.
Invariant: without </think>, or without a boxed answer after it, there is no answer.
"""

from __future__ import annotations

from slime.rollout.rm_hub.mathematics import equal_as_mathematics, last_boxed
from slime.rollout.rm_hub.response import THINK_END


def deepscaler(response: str, label: str) -> float:
    """1 where the answer is right, else 0 (also without </think>, or without a boxed answer after it)."""
    return mathematics_score(boxed_answer(response), label)


def boxed_answer(response: str) -> str | None:
    r"""What the last \boxed{...} after the last </think> holds; None where either is missing."""
    _, think_end, answer = response.rpartition(THINK_END)
    return last_boxed(answer) if think_end else None


def mathematics_score(answer: str | None, label: str) -> float:
    """1 where there is an answer, and it equals the label as mathematics; else 0."""
    return 1.0 if answer is not None and equal_as_mathematics(answer, label) else 0.0
