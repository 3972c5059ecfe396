r"""The deepscaler rule: 1 if the last box after the last </think> equals the label as mathematics, else 0.

- Called by: `registry` reads the answer with it. The evaluation's metric `format` counts the responses that have one.
- Invariant: without </think>, or without a boxed answer after it, there is no answer.
"""

from __future__ import annotations

from slime.config.labels import stated_answer
from slime.core.boxes import Answer, boxed
from slime.rollout.rewards.mathematics import equal_as_mathematics
from slime.rollout.rewards.response import THINK_END


def deepscaler(response: str, label: str) -> float:
    """Return 1 if the answer is right, else 0 (also without </think>, or without a boxed answer after it)."""
    return mathematics_score(read_boxed(response), label)


def read_boxed(response: str) -> Answer | None:
    """Return the answer in the last box after the last </think>; None if either is missing."""
    _, think_end, answer = response.rpartition(THINK_END)
    return boxed(answer) if think_end else None


def boxed_answer(response: str) -> str | None:
    """Return the text of `read_boxed`."""
    answer = read_boxed(response)
    return None if answer is None else answer.text


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
