"""The part of a response that holds the answer.

- Called by: rules for answers in words read `final_text`, as `final_answer`.
- Invariant: it takes time linear in the response, whatever the response contains.
"""

from __future__ import annotations

import re

from slime.core.boxes import Answer

THINK_END = "</think>"

_END_MARK = re.compile(r"(?:<[|｜][^<>|｜\s]{1,64}[|｜]>|</s>|<eos>|<end_of_turn>)$")
_LONGEST_MARK = 68


def final_text(response: str) -> str:
    """Return the text after the last </think> (all of it without one), without the marks that ended the turn.

    A response has such marks as text unless --rollout-skip-special-tokens is given: `Paris<|user|>` answers Paris.
    """
    text = response.rpartition(THINK_END)[2]
    end = len(text.rstrip())
    while (mark := _END_MARK.search(text, max(0, end - _LONGEST_MARK), end)) is not None:
        end = mark.start()
        while end and text[end - 1].isspace():
            end -= 1
    return text[:end]


def final_answer(response: str) -> Answer:
    """Return `final_text` as the answer."""
    return Answer(final_text(response))
