"""Turn text of any origin into text that a terminal, a log and UTF-8 can take.

- Used by: messages and the plan, for values, paths and lines of files.
- Invariant: the result is printable, on one line, and not much longer than its limit.
"""

from __future__ import annotations

VALUE = 200
"""Characters of one value in a message."""
PLACE = 400
"""Characters of a flag, or of a file and line."""
SENTENCE = 1000
"""Characters of a rule, a remedy or a line of the plan; these may contain a path or a list of names."""


def printable(text: str, limit: int = VALUE) -> str:
    """Return `text` with unprintable characters escaped; a text longer than `limit` keeps its beginning and its end.

    Line feeds are escaped too: `"a\\nb"` gives `a\\\\nb`. Undecodable bytes of a command line, which Python keeps as
    surrogates, become `\\\\udcff`.
    """
    if len(text) > limit:
        head = limit * 3 // 4
        left_out = f" ... ({len(text):,} characters in all) ... "
        return _escaped(text[:head]) + left_out + _escaped(text[head - limit :])
    return _escaped(text)


def one_line(text: str, limit: int = SENTENCE) -> str:
    """Return `printable` text in which each run of white space, such as the line breaks of a message, is one space."""
    return printable(" ".join(text.split()) if len(text) <= 100 * limit else text, limit)


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
