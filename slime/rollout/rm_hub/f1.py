"""Token F1: how many words the answer and the label share, from 0 to 1.

Path: `registry` scores with it. Source: Rajpurkar et al., "SQuAD", 2016 (arXiv:1606.05250), section 6.1, and the
normalisation of its evaluation script; "yes", "no" and "noanswer" score as a whole, as HotpotQA's script has it
(Yang et al., 2018, arXiv:1809.09600). Invariant: no answer is worth 0.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

import orjson

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WHOLE = frozenset({"yes", "no", "noanswer"})


def f1_score(answer: str | None, label: str) -> float:
    """F1 of the answer's words against the label's; of several accepted answers (see `accepted`), the best."""
    return 0.0 if answer is None else max(_f1(answer, text) for text in accepted(label))


def accepted(label: str) -> list[str]:
    """The answers that the label takes: itself, or the texts of a JSON list of texts (`["Paris", "Paris, France"]`)."""
    if label.lstrip().startswith("["):
        try:
            texts: Any = orjson.loads(label)
        except orjson.JSONDecodeError:
            return [label]
        if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
            return texts
    return [label]


def normalise(text: str) -> str:
    """Lower case, without punctuation (ASCII), articles (a, an, the) and surplus blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _f1(answer: str, label: str) -> float:
    ours, theirs = normalise(answer), normalise(label)
    if not theirs:  # a label such as "+" or "The": its words are what normalisation takes away
        return float(answer.strip().lower() == label.strip().lower())
    if ours != theirs and (ours in _WHOLE or theirs in _WHOLE):
        return 0.0
    words, label_words = ours.split(), theirs.split()
    shared = (Counter(words) & Counter(label_words)).total()
    return 2 * shared / (len(words) + len(label_words))
