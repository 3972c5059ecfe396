r"""Multiple choice: the letter that the answer chooses is the right one -> 1, else 0.

Path: `registry` scores with it. Source: Rein et al., "GPQA: a graduate-level Google-proof Q&A benchmark", 2023
(arXiv:2311.12022); where the letter is read from, see `chosen_letter`. Invariant: an answer that names several letters,
or none, is wrong; a label that names no letter is an error and not a wrong answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from slime.config.labels import LETTERS, right_letter

_WRAP = r"(?:[\s*_$({\[\"'`]|\\(?:boxed|text|textbf|mathbf|mathrm|rm|bf)\b|\\[(\[]){0,12}"
"""What may stand before the letter: bold, brackets, LaTeX."""
_DECLARED = re.compile(
    r"(?i:\b(?:answer|option|choice)[*_ ]{0,4}(?:(?:is|would be|should be|must be)\b|(?=[:：]))"
    r"[\s*_]{0,4}[:：]?(?:[\s*_]{0,4}(?:therefore|thus|option|choice|letter)){0,2}"
    r"|(?=\\boxed\b))" + _WRAP + r"(?P<letter>[A-J])(?![A-Za-z0-9_'’(])(?![-–]\w)"
    r"(?!\s*(?:[=+^]|\\(?![)\]])))"
)
"""A formula (`E=mc^2`), a word (`B-cells`) and a chemical (`C60`) are no letters."""
_BRACKETED = re.compile(r"\(([A-J])\)")
_ALONE = re.compile(_WRAP + r"(?P<letter>[A-J])[\s*_$)}\].:\"'`]{0,12}", re.IGNORECASE)
_SECOND = re.compile(
    r"[\s*_$)}\]\"'`]{0,12}(?:,|/|&|\bor\b|\band\b)" + _WRAP + r"(?:and\b|or\b)?" + _WRAP + r"[A-J](?!\w)"
)
_SENTENCE_GOES_ON = re.compile(r"[ \t]+(?!because|since|as\b|is\b|which|with\b|for\b|and\b|or\b)[a-z]")
"""After "A" and "I": then they are words (`Answer: I think ...`)."""


def gpqa_score(answer: str | None, label: str, metadata: Mapping[str, Any]) -> float:
    """1 where the answer chooses the right letter, else 0.

    Raises:
        ValueError: the label names no letter.
    """
    choices = metadata.get("choices")
    right = right_letter(label, choices, metadata.get("correct_letter"))
    letters = LETTERS[: len(choices)] if isinstance(choices, list) and choices else LETTERS
    return 1.0 if answer is not None and chosen_letter(answer, letters) == right else 0.0


def chosen_letter(text: str, letters: str = LETTERS) -> str | None:
    r"""The letter that an answer chooses; None where it chooses none, or several.

    1. The last one declared: "the answer is B", "Answer: (B)", "correct choice is B", \boxed{B}. A second letter behind
       it ("B or C"), or one that is no choice, makes it none.
    2. Else the one letter in brackets, where all of "(B)", "(B)" are the same.
    3. Else the whole text, where it is nothing but a letter (of either case).
    """
    declared: list[str | None] = []
    for match in _DECLARED.finditer(text):
        letter, rest = match["letter"], match.end()
        if not (letter in "AI" and _SENTENCE_GOES_ON.match(text, rest)):
            declared.append(letter if letter in letters and not _SECOND.match(text, rest) else None)
    if declared:
        return declared[-1]
    bracketed = {letter for letter in _BRACKETED.findall(text) if letter in letters}
    if bracketed:
        return bracketed.pop() if len(bracketed) == 1 else None
    alone = _ALONE.fullmatch(text.strip())
    letter = None if alone is None else alone["letter"].upper()
    return letter if letter is not None and letter in letters else None
