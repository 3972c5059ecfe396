r"""Boxes in a response: what `\boxed{...}` and `\fbox{...}` hold, and which of them is the answer.

Path: the rules read answers with it, and labels that hold a box. Invariant: it is linear in the text, whatever stands
in it, and a box that is cut off is no answer.

    \boxed{34}, \boxed {34}, \fbox{34}          34
    \boxed 34, \boxed\frac12                    34, \frac12: the next word of the same line, without a full stop
    \boxed{x=\boxed{5}}                          x={5}: the outer one
    \boxed{1} no, \boxed{34}                    34: the last one
    \boxed{3} and \boxed{5}; \boxed{3}, \boxed{5}     3, 5: nothing but a separator is between them, so they are a list
    x=\boxed{3}, y=\boxed{5}                    5, and the list 3, 5 where the label is one
    \boxed{34} ... \boxed{1                     none: the last one does not close
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAMES = r"(?:boxed|fbox)(?![A-Za-z])"
_TOKEN = re.compile(rf"(?P<box>\\{_NAMES}\s*\{{?)|\\\\(?!{_NAMES})|\\[{{}}]|(?P<open>\{{)|(?P<close>\}})")
"""A box, a pair of backslashes, an escaped brace, a brace. (JSON's `\\\\boxed` is a box, too.)"""
_BOX = re.compile(rf"\\{_NAMES}")
_WORD_START = re.compile(r"[-+−]?[0-9.]|\\[A-Za-z{]|[-+−]?[A-Za-z](?![A-Za-z])|[(\[|]")
"""What a box without braces may begin with: prose that names `\\boxed` goes on with a word."""
_WORD_PART = re.compile(r"\\[)\]]|\\[A-Za-z]+|\\.|[\s$(){}\[\]]")
_MAX_WORD = 200
_INNER = re.compile(rf"\\{_NAMES}[ \t]*(?=\{{)")
"""The command of a box inside another: its braces stay."""

_MAX_GAP = 80
"""Characters between two boxes that are joined."""
_MAX_JOINED = 20
_SPACE = r"(?:[\s$*~]|\\[()\[\],;:! ]|\\q?quad\b)*"
_WITH_WORD = r"(?:\b(?:and|or)\b|\\(?:text|mathrm|textrm|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|[和或与及])"
_BARE = re.compile(rf"{_SPACE}(?:[,;，；、&]{_SPACE}(?:{_WITH_WORD}{_SPACE})?|{_WITH_WORD}{_SPACE})", re.IGNORECASE)
_NAMED = re.compile(rf"{_BARE.pattern}(?:\\?[A-Za-z]+(?:_(?:\w|\{{\w+\}}))?)\s*={_SPACE}", re.IGNORECASE)


@dataclass(frozen=True)
class Box:
    """One box: where its command starts, where it ends, and what it holds."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Answer:
    """What a response answers.

    `text`: the last box, or the list of those that only a separator joins to it. `parts`: the boxes of that list, and
    of one whose entries are named (`x=\\boxed{3}, y=\\boxed{5}`); empty where the last box is alone.
    """

    text: str
    parts: tuple[str, ...] = ()


def last_boxed(text: str) -> str | None:
    """What the last box holds (see the module); None where there is none, it is empty, or it does not close."""
    answer = boxed(text)
    return None if answer is None else answer.text


def boxed(text: str, within: int | None = None) -> Answer | None:
    """The answer in the last box; None as in `last_boxed`. Only boxes that start before `within` count."""
    boxes = find_boxes(text)
    if boxes is None:
        return None
    run: list[Box] = []
    bare = True
    for box in reversed(boxes if within is None else [box for box in boxes if box.start < within]):
        if run:
            joined = join(text, box, run[0])
            if joined is None or len(run) == _MAX_JOINED:
                break
            bare = bare and joined
        run.insert(0, box)
    if not run:
        return None
    parts = tuple(dict.fromkeys(box.text for box in run))
    if len(parts) == 1:
        return Answer(parts[0])
    return Answer(", ".join(parts) if bare else parts[-1], parts)


def names_box(text: str) -> bool:
    """Whether there is a box in the text, also an empty one or one that does not close."""
    return _BOX.search(text) is not None


def join(text: str, first: Box, second: Box) -> bool | None:
    """Whether a separator alone is between two boxes; False where a name follows it; None where they are not joined."""
    gap = text[first.end : second.start] if second.start - first.end <= _MAX_GAP else ""
    if _BARE.fullmatch(gap):
        return True
    return False if _NAMED.fullmatch(gap) else None


def find_boxes(text: str) -> list[Box] | None:
    """The boxes that hold something, in order, of nested ones the outer; None where the last one does not close."""
    spans: list[tuple[int, int, int, int]] = []
    """Start and end of a box, and of what it holds."""
    opened: list[tuple[int, int] | None] = []
    """For each open brace the start of its box and of what it holds; None for one of no box."""
    position = 0
    while (token := _TOKEN.search(text, position)) is not None:
        position = token.end()
        if token["box"] is not None:
            if token["box"].endswith("{"):
                opened.append((token.start(), position))
            elif (end := _word_end(text, position)) > position:
                spans.append((token.start(), end, position, end))
                position = end
        elif token["open"] is not None:
            opened.append(None)
        elif token["close"] is not None and opened and (box := opened.pop()) is not None:
            while spans and spans[-1][0] > box[0]:
                spans.pop()
            spans.append((box[0], position, box[1], position - 1))
    unclosed = max((box[0] for box in opened if box is not None), default=-1)
    if unclosed > (spans[-1][0] if spans else -1):
        return None
    boxes = [Box(start, end, _INNER.sub("", text[first:last])) for start, end, first, last in spans]
    return [box for box in boxes if box.text.strip()]


def _word_end(text: str, start: int) -> int:
    """Where the word ends that a box without braces holds; `start` where there is none.

    A word goes on to a space, the end of the formula or a bracket that was not opened in it.
    """
    if _WORD_START.match(text, start) is None:
        return start
    limit = min(len(text), start + _MAX_WORD)
    depth, end = 0, start
    for part in _WORD_PART.finditer(text, start, limit):
        end = part.start()
        match part[0]:
            case "(" | "[" | "{" | r"\{":
                depth += 1
            case ")" | "]" | "}" | r"\}":
                depth -= 1
                if depth < 0:
                    break
            case r"\)" | r"\]" | "$" | "\n":
                break
            case space if space.isspace() and depth == 0:
                break
            case _:
                pass
    else:
        end = limit
    return start + len(text[start:end].rstrip(".,;:!?*"))
