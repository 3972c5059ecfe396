r"""The DAPO rule: what stands after the last "Answer:" is equivalent to the label -> 1, else -1.

Path: `registry` reads the answer and scores it. Source: Yu et al., "DAPO: an open-source LLM reinforcement learning
system at scale", 2025 (arXiv:2503.14476), section 2.4: R = 1 where is_equivalent(y, y_hat), else -1. Prompts of
dapo-math-17k ask for a last line `Answer: \boxed{$Answer}`; like the paper's recipe, only the last 300 characters are
looked at. Invariant: a response without an answer is wrong, -1, and never 0.
"""

from __future__ import annotations

import re

from slime.rollout.rm_hub.mathematics import equal_as_mathematics, last_boxed
from slime.rollout.rm_hub.response import final_text

TAIL = 300
"""Characters at the end of the response in which the answer has to stand."""

_ANSWER = re.compile(r"answer[ \t]*[*_]{0,3}[ \t]*[:：][*_]{0,3}", re.IGNORECASE)
_DISPLAY = re.compile(r"\s*(?:(?:\\\[|\$\$)[ \t]*\n\s*)?")
"""What may stand between "Answer:" and the answer: a formula of its own lines opens there."""


def dapo_answer(response: str) -> str | None:
    r"""What follows the last "Answer:" on its line, or on the next one; of a \boxed{...} there, what it holds.

    Letters of either case; None where there is no "Answer:", or nothing after it.
    """
    tail = final_text(response)[-TAIL:]
    found = list(_ANSWER.finditer(tail))
    if not found:
        return None
    start = _DISPLAY.match(tail, found[-1].end())
    assert start is not None, "it matches nothing, too"
    line = tail[start.end() :].partition("\n")[0].strip()
    boxed = last_boxed(line)
    return (line.strip("*_` ") or None) if boxed is None else boxed


def dapo_score(answer: str | None, label: str) -> float:
    """1 where there is an answer that equals the label as mathematics; else -1."""
    return 1.0 if answer is not None and equal_as_mathematics(answer, label) else -1.0
