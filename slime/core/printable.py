"""Text of any origin as one that a terminal, a log and UTF-8 can take.

Path: messages and the plan show values, paths and lines of files through it. Invariant: what comes out is printable,
on one line, and not much longer than its limit.
"""

from __future__ import annotations

VALUE = 200
"""Characters of one value in a message."""
PLACE = 400
"""Characters of a flag, or of a file and line."""
SENTENCE = 1000
"""Characters of a rule, a remedy or a line of the plan; they may hold a path or a list of names."""


def printable(text: str, limit: int = VALUE) -> str:
    """`text` with everything that does not print escaped; a longer one keeps its beginning and its end.

    Line feeds are escaped too: `"a\\nb"` gives `a\\\\nb`. Undecodable bytes of a command line, which Python keeps as
    surrogates, come out as `\\\\udcff`.
    """
    if len(text) > limit:
        head = limit * 3 // 4
        left_out = f" ... ({len(text):,} characters in all) ... "
        return _escaped(text[:head]) + left_out + _escaped(text[head - limit :])
    return _escaped(text)


def one_line(text: str, limit: int = SENTENCE) -> str:
    """`printable`, with runs of white space (a message of several lines has some) as one space."""
    return printable(" ".join(text.split()) if len(text) <= 100 * limit else text, limit)


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
