"""Token F1: the share of words that the answer and the label have in common, from 0 to 1.

- Called by: `reward` finds it in the table of types.
- Invariant: a missing answer is worth 0.

Source: Rajpurkar et al., "SQuAD", 2016 (arXiv:1606.05250), section 6.1, and the normalization of its evaluation script.
"yes", "no" and "noanswer" score as a whole, as in HotpotQA's script (Yang et al., 2018, arXiv:1809.09600).

For example, the answer "the red car" and the label "a fast red car" are {red, car} and {fast, red, car} after
normalization: 2 shared words, so F1 = 2 * 2 / (2 + 3) = 0.8.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

import orjson

from slime.core.boxes import Answer
from slime.rollout.rewards.response import final_answer
from slime.rollout.rewards.reward import Reward, against_label

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WHOLE = frozenset({"yes", "no", "noanswer"})


def f1_score(answer: str | None, label: str) -> float:
    """Return the F1 of the answer's and the label's words; with several accepted answers (`accepted`), the best."""
    return 0.0 if answer is None else max(_f1(answer, text) for text in accepted(label))


def accepted(label: str) -> list[str]:
    """Return the accepted answers: the label, or the texts of a JSON list of texts (`["Paris", "Paris, France"]`)."""
    if label.lstrip().startswith("["):
        try:
            texts: Any = orjson.loads(label)
        except orjson.JSONDecodeError:
            return [label]
        if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
            return texts
    return [label]


def normalise(text: str) -> str:
    """Convert to lower case, without punctuation (ASCII), articles (a, an, the) and extra spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _f1(answer: str, label: str) -> float:
    ours, theirs = normalise(answer), normalise(label)
    if not theirs:  # a label such as "+" or "The", of which normalization leaves no word
        return float(answer.strip().lower() == label.strip().lower())
    if ours != theirs and (ours in _WHOLE or theirs in _WHOLE):
        return 0.0
    words, label_words = ours.split(), theirs.split()
    shared = (Counter(words) & Counter(label_words)).total()
    return 2 * shared / (len(words) + len(label_words))


def _score(answer: Answer | None, label: str) -> float:
    return f1_score(None if answer is None else answer.text, label)


REWARD = Reward(read=final_answer, score=against_label(_score))
