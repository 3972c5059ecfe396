"""Say which sample a process works on, so that what user code prints meanwhile can be told apart.

- Used by: the rollout manager and reward workers set `about`; their output and their log show it on each line.
- Invariant: it belongs to one task, and to the threads that the task starts with `asyncio.to_thread`.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO, cast

_ABOUT: ContextVar[str] = ContextVar("about", default="")
_MOST_HELD = 8192
"""Characters of a line without an end that are held back."""


def prefix() -> str:
    """Return `sample 17: ` inside a block of `about("sample 17")`, and nothing elsewhere."""
    return _ABOUT.get()


@contextmanager
def about(what: str) -> Generator[None]:
    """Mark what this task logs and prints in the block as being about `what`."""
    token = _ABOUT.set(f"{what}: ")
    try:
        yield
    finally:
        for stream in cast(list[Any], [sys.stdout, sys.stderr]):
            if hasattr(stream, "end_line"):  # a LabelledStream, maybe inside of a MaskedStream
                stream.end_line()
        _ABOUT.reset(token)


class LabelledStream:
    """A text stream that begins each line with `prefix()` and writes whole lines at once, so that tasks do not mix."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._held: dict[str, str] = {}
        """The last line of each prefix, as far as it has come."""

    def write(self, text: str) -> int:
        label = prefix()
        *lines, rest = (self._held.pop(label, "") + text).split("\n")
        self._stream.write("".join(f"{label}{line}\n" for line in lines))
        if rest:
            self._held[label] = rest
        if len(rest) > _MOST_HELD:
            self.end_line()
        return len(text)

    def end_line(self) -> None:
        """Write the line that this task has begun."""
        if prefix() in self._held:
            self.write("\n")

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def label_output() -> None:
    """Write what this process prints to its descriptors 1 and 2 line by line, each with its label."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = open(number, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        setattr(sys, name, cast(TextIO, LabelledStream(stream)))
