r"""Boxes in a response: the content of `\boxed{...}` and `\fbox{...}`, and which of them is the answer.

- Used by: the rule-based graders, on answers and on labels that contain a box.
- Invariant: the time is linear in the length of any text, and a box that is cut off is not an answer.

    \boxed{34}, \boxed {34}, \fbox{34}          34
    \boxed 34, \boxed\frac12                    34, \frac12: the next word on the same line, without a full stop
    \boxed{x=\boxed{5}}                         x={5}: the outer one
    \boxed{1} no, \boxed{34}                    34: the last one
    \boxed{3} and \boxed{5}; \boxed{3}, \boxed{5}     3, 5: a list, because only a separator is between them
    x=\boxed{3}, y=\boxed{5}                    5, or the list 3, 5 if the label is a list
    \boxed{34} ... \boxed{1                     none: the last one does not close
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAMES = r"(?:boxed|fbox)(?![A-Za-z])"
_TOKEN = re.compile(rf"(?P<box>\\{_NAMES}\s*\{{?)|\\\\(?!{_NAMES})|\\[{{}}]|(?P<open>\{{)|(?P<close>\}})")
"""Matches a box, a pair of backslashes, an escaped brace, or a brace. (`\\\\boxed`, as in JSON, is a box too.)"""
_BOX = re.compile(rf"\\{_NAMES}")
_WORD_START = re.compile(r"[-+−]?[0-9.]|\\[A-Za-z{]|[-+−]?[A-Za-z](?![A-Za-z])|[(\[|]")
"""The start of a box without braces. Text that only mentions `\\boxed` continues with an ordinary word instead."""
_WORD_PART = re.compile(r"\\[)\]]|\\[A-Za-z]+|\\.|[\s$(){}\[\]]")
_MAX_WORD = 200
_INNER = re.compile(rf"\\{_NAMES}[ \t]*(?=\{{)")
"""The command of a box inside another box; it is removed and its braces stay."""

_MAX_GAP = 80
"""The largest number of characters between two boxes that form a list."""
_MAX_JOINED = 20
_SPACE = r"(?:[\s$*~]|\\[()\[\],;:! ]|\\q?quad\b)*"
_WITH_WORD = r"(?:\b(?:and|or)\b|\\(?:text|mathrm|textrm|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|[和或与及])"
_BARE = re.compile(rf"{_SPACE}(?:[,;，；、&]{_SPACE}(?:{_WITH_WORD}{_SPACE})?|{_WITH_WORD}{_SPACE})", re.IGNORECASE)
_NAMED = re.compile(rf"{_BARE.pattern}(?:\\?[A-Za-z]+(?:_(?:\w|\{{\w+\}}))?)\s*={_SPACE}", re.IGNORECASE)


@dataclass(frozen=True)
class Box:
    """One box: where its command starts, where the box ends, and its content."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Answer:
    """The answer that a response gives in its boxes.

    `text` is the last box, or the list of all boxes that only separators connect to it. `parts` has the boxes of that
    list, or of a list with named entries (`x=\\boxed{3}, y=\\boxed{5}`); it is empty when the last box is alone.
    """

    text: str
    parts: tuple[str, ...] = ()


def last_boxed(text: str) -> str | None:
    """Return the content of the last box (see the module); None if there is none, it is empty, or it does not close."""
    answer = boxed(text)
    return None if answer is None else answer.text


def boxed(text: str, within: int | None = None) -> Answer | None:
    """Return the answer in the last box, None as in `last_boxed`. Only boxes that start before `within` count."""
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
    """Return whether the text has a box, including an empty one and one that does not close."""
    return _BOX.search(text) is not None


def join(text: str, first: Box, second: Box) -> bool | None:
    """Return True if only a separator is between two boxes, False if a name follows it (`, y=`), otherwise None."""
    gap = text[first.end : second.start] if second.start - first.end <= _MAX_GAP else ""
    if _BARE.fullmatch(gap):
        return True
    return False if _NAMED.fullmatch(gap) else None


def find_boxes(text: str) -> list[Box] | None:
    """Return the boxes with content, in order; of nested boxes the outer one. None when the last box does not close."""
    spans: list[tuple[int, int, int, int]] = []
    """For each box: its start and end, then the start and end of its content."""
    opened: list[tuple[int, int] | None] = []
    """For each open brace: the start of its box and of the content; None if the brace belongs to no box."""
    first = _BOX.search(text)
    position = len(text) if first is None else first.start()
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
    """Return the end of the word that a box without braces contains, or `start` if there is none.

    The word ends at a space, at the end of the formula, or at a closing bracket that was not opened inside it.
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
