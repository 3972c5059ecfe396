r"""The reading of labels by each reward, and the check for labels that no answer can match.

- Used by: the check of data rows, before anything starts; `rollout.rewards` reads labels with the same functions.
- Invariant: for a label that passes, a right answer exists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from slime.core.boxes import last_boxed, names_box

MAX_LABEL = 1000
"""The largest number of characters in an answer that is read as mathematics."""
MARK = "####"
"""The mark before the answer of a solution in GSM8K (Cobbe et al., 2021, arXiv:2110.14168): `... #### 72`."""
LETTERS = "ABCDEFGHIJ"
"""The letters of choices."""

_PLAIN = re.compile(r"\s*[+-]?[0-9]{1,100}(?:\.[0-9]{1,100})?\s*")
"""A plain number. Most labels are one, and need no further check."""
_EMPTY_GROUP = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{\s*\}")
_ARGUMENTS = {"frac": 2, "dfrac": 2, "tfrac": 2, "cfrac": 2, "binom": 2, "sqrt": 1}
_WITH_ARGUMENTS = re.compile(rf"\\({'|'.join(_ARGUMENTS)})(?![A-Za-z])(?:\s*\[[^\]]*\])?")
_ARGUMENT = re.compile(r"\s*(?:(\{)(?!\s*\})|\\[A-Za-z]+|[^\s{}\\&])")


def stated_answer(label: str) -> str:
    r"""Return the answer in a label for the rules of mathematics: the text after GSM8K's `####`, or the whole label.

    Raises:
        ValueError: there are several marks, nothing follows the mark, or lines follow the answer.
    """
    if MARK not in label:
        return label
    _, answer, *more = label.split(MARK)
    answer = answer.strip()
    if more:
        raise ValueError(f"it has {label.count(MARK)} marks {MARK} of GSM8K, but the answer must follow a single one")
    if not answer:
        raise ValueError(f"nothing follows {MARK}, GSM8K's mark of the answer")
    if "\n" in answer:
        raise ValueError(f"more than one line follows {MARK}, GSM8K's mark of the answer")
    return answer


def label_fault(label: str) -> str | None:
    """Return in one sentence why no answer can equal the label as mathematics, or None if one can."""
    if _PLAIN.fullmatch(label):
        return None
    try:
        text = stated_answer(label).strip()
    except ValueError as error:
        return str(error)
    held = last_boxed(text)
    if held is None and names_box(text):
        return r"its \boxed is empty, or is never closed"
    text = _EMPTY_GROUP.sub("", text if held is None else held).strip("$. \n\t")
    if not text:
        return "it is empty"
    if len(text) > MAX_LABEL:
        return f"it has {len(text)} characters, but answers of more than {MAX_LABEL} are not read"
    return unbalanced(text) or _without_argument(text)


def unbalanced(text: str) -> str | None:
    r"""Return in one sentence the first brace, `\left` or `\begin` without a partner; None if all have one."""
    depth = 0
    for token in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += (token == "{") - (token == "}")
        if depth < 0:
            return "a `}` closes no `{`"
    if depth:
        return "a `{` is never closed"
    for opening, closing in (("left", "right"), ("begin", "end")):
        counts = [len(re.findall(rf"\\{name}(?![A-Za-z])", text)) for name in (opening, closing)]
        if counts[0] != counts[1]:
            return rf"it has {counts[0]} \{opening} and {counts[1]} \{closing}"
    return None


def _without_argument(text: str) -> str | None:
    """Return the first command that lacks an argument, as a sentence; None if all have theirs."""
    for command in _WITH_ARGUMENTS.finditer(text):
        end = command.end()
        for number in range(_ARGUMENTS[command[1]]):
            argument = _ARGUMENT.match(text, end)
            if argument is None:
                return rf"a \{command[1]} has {number} of its {_ARGUMENTS[command[1]]} arguments"
            end = argument.end() if argument[1] is None else _group_end(text, argument.end())
    return None


def _group_end(text: str, start: int) -> int:
    """Return the place after the brace that closes the group whose content begins at `start`."""
    depth = 1
    for token in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return start + token.end()
    return len(text)


def right_letter(label: str, choices: object = None, correct_letter: object = None) -> str:
    """Return the letter of the right choice.

    It is metadata.correct_letter if given, otherwise the label if that is a letter, otherwise the label's place in
    metadata.choices: with the choices ["3", "4"], the label "4" gives B.

    Raises:
        ValueError: none of them gives a letter, or the label is a letter and also the text of another choice.
    """
    texts = [str(choice).strip() for choice in cast(list[Any], choices)] if isinstance(choices, list) else []
    place = texts.index(label.strip()) if label.strip() in texts else None
    if correct_letter is not None:
        return _letter(str(correct_letter), "metadata.correct_letter")
    if re.fullmatch(r"\s*\(?[A-Ja-j]\)?\.?\s*", label):
        letter = _letter(label, "the label")
        if place is not None and LETTERS[place] != letter:
            raise ValueError(
                f"the label {label!r} is a letter and also the text of choice {LETTERS[place]}; "
                "set metadata.correct_letter"
            )
        return letter
    if place is None:
        raise ValueError(
            f"the label {label!r} is neither a letter (A to J) nor one of metadata.choices {str(texts)[:200]}"
        )
    if place >= len(LETTERS):
        raise ValueError(f"the label {label!r} is choice {place + 1}, but letters end at {LETTERS[-1]}")
    if texts.count(label.strip()) > 1:
        raise ValueError(f"the label {label!r} is the text of several choices; set metadata.correct_letter")
    return LETTERS[place]


def _letter(text: str, what: str) -> str:
    letter = text.strip(" ().").upper()
    if len(letter) != 1 or letter not in LETTERS:
        raise ValueError(f"{what} is {text!r}; it must be a letter from A to J")
    return letter


def choice_fault(label: str, metadata: Mapping[str, Any]) -> str | None:
    """Return why no letter is right, or None if one is."""
    choices = metadata.get("choices")
    try:
        letter = right_letter(label, choices, metadata.get("correct_letter"))
    except ValueError as error:
        return str(error)
    number = len(cast(list[Any], choices)) if isinstance(choices, list) else 0
    if number and letter not in LETTERS[:number]:
        return f"the right letter is {letter}, but there are only {number} choices"
    return None
