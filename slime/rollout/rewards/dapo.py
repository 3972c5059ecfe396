r"""The DAPO rule: 1 if the text after the last "Answer:" is equivalent to the label, else -1.

- Called by: `reward` finds it in the table of types.
- Invariant: a response without an answer is wrong and gets -1, never 0.

Source: Yu et al., "DAPO: an open-source LLM reinforcement learning system at scale", 2025 (arXiv:2503.14476), section
2.4: R = 1 if is_equivalent(y, y_hat), else -1. Prompts of dapo-math-17k ask for a last line `Answer: \boxed{$Answer}`.
Like the paper's recipe, only the last 300 characters are read.
"""

from __future__ import annotations

import re

from slime.core.boxes import Answer, boxed, names_box
from slime.rollout.rewards.mathematics import is_right
from slime.rollout.rewards.response import final_text
from slime.rollout.rewards.reward import Reward, against_label

TAIL = 300
"""The number of characters at the end of the response in which the answer has to be."""

_ANSWER = re.compile(r"answer[ \t]*[*_}]{0,3}[ \t]*[:：](?:[ \t]?\}|[*_]{0,3})", re.IGNORECASE)
_DISPLAY = re.compile(r"\s*(?:(?:\\\[|\$\$)[ \t]*\n\s*)?")
"""The text that may be between "Answer:" and the answer: the beginning of a formula on lines of its own."""


def read_dapo(response: str) -> Answer | None:
    """Return the answer after the last "Answer:", on its line or on the next one; of boxes there, their contents.

    Upper and lower case are alike. A box ends where its braces close, also on a later line. None if there is no
    "Answer:", nothing after it, or a box that is empty or does not close.
    """
    tail = final_text(response)[-TAIL:]
    found = list(_ANSWER.finditer(tail))
    if not found:
        return None
    start = _DISPLAY.match(tail, found[-1].end())
    assert start is not None, "it matches nothing, too"
    rest = tail[start.end() :]
    line = rest.partition("\n")[0]
    if names_box(line):
        return boxed(rest, within=len(line)) or boxed(line)
    text = line.strip().strip("*_` ")
    return Answer(text) if text else None


def dapo_answer(response: str) -> str | None:
    """Return the text of `read_dapo`."""
    answer = read_dapo(response)
    return None if answer is None else answer.text


def dapo_score(answer: Answer | None, label: str) -> float:
    """Return 1 if there is an answer that equals the label as mathematics, else -1."""
    return 1.0 if answer is not None and is_right(answer, label) else -1.0


REWARD = Reward(read=read_dapo, score=against_label(dapo_score), lowest=-1.0)
