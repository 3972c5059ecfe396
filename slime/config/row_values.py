"""The check for values in a data row that would fail or change later.

- Used by: `data_files`, for each row.
- Invariant: a row that passes can be encoded as UTF-8 and JSON, copied and pickled, and is read as it is written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any, cast

MAX_DEPTH = 100
"""The largest depth of nested lists and objects; Python's copy and orjson's writer fail at a few hundred."""
_ODD = re.compile(rb"\\u00[0-7]|[0-9]{16}|[0-9][eE]\+?[0-9]{3}")
"""A pattern for an escaped ASCII character (such as NUL), a long number or a large exponent."""

Fault = tuple[str, str]
"""The rule and the remedy."""


def line_fault(line: bytes, keys: Iterable[str]) -> Fault | None:
    """Return the fault inside a line of valid JSON, or None.

    For most lines the bytes show that there can be no fault, so they are not parsed a second time. `keys`: keys that
    must not be repeated.
    """
    deep = line.count(b"[") + line.count(b"{") > MAX_DEPTH
    if not deep and _ODD.search(line) is None and all(line.count(f'"{key}"'.encode()) < 2 for key in keys):
        return None
    try:
        return value_fault(json.loads(line, object_pairs_hook=_Pairs, parse_int=_whole_number))
    except RecursionError:
        return _too_deep()


def value_fault(data: Any) -> Fault | None:
    """Return the fault inside one row, or None."""
    waiting: list[tuple[Any, int]] = [(data, 0)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, dict | list):
            if depth == MAX_DEPTH:
                return _too_deep()
            if isinstance(value, _Pairs) and value.twice is not None:
                return f"the key {value.twice!r} is repeated", "leave one of the two out"
            held = cast(dict[Any, Any] | list[Any], value)
            waiting += ((each, depth + 1) for each in (held.values() if isinstance(held, dict) else held))
            waiting += ((key, depth + 1) for key in (held if isinstance(held, dict) else ()))
        elif (fault := _fault(value)) is not None and (depth > 1 or not isinstance(value, float)):
            return fault  # the row check reports a label that is a bad float
    return None


def _fault(value: Any) -> Fault | None:
    if isinstance(value, str):
        if "\0" in value:
            return "a text has a NUL character", "remove it"
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            return "a text has half of a surrogate pair, which UTF-8 cannot write", "correct the text"
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            return "a whole number has more than 64 bits", "write it as text"
    elif isinstance(value, float) and not math.isfinite(value):
        return f"a number is {value}, which JSON cannot write", "correct it"
    return None


def _too_deep() -> Fault:
    return f"its lists and objects are nested more than {MAX_DEPTH} deep", "make it flatter"


class _Pairs(dict[str, Any]):
    """A JSON object that remembers a repeated key."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        keys = [key for key, _ in pairs]
        self.twice = None if len(self) == len(keys) else next(key for key in self if keys.count(key) > 1)


def _whole_number(text: str) -> int:
    return int(text) if len(text) < 100 else 2**64  # int() refuses thousands of digits
