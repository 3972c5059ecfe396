r"""The deepscaler rule: 1 if the last box after the last </think> equals the label as mathematics, else 0.

- Called by: `reward` finds it in the table of types. The evaluation's metric `format` counts the responses that have
  an answer.
- Invariant: without </think>, or without a boxed answer after it, there is no answer.
"""

from __future__ import annotations

from slime.core.boxes import Answer, boxed
from slime.rollout.rewards.mathematics import mathematics_score
from slime.rollout.rewards.response import THINK_END
from slime.rollout.rewards.reward import Reward, against_label


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


REWARD = Reward(read=read_boxed, score=against_label(mathematics_score), reports_format=True)
