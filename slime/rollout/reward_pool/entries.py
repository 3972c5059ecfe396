"""Turn the entries of a reward dict into plain data, which can go through a pipe and into dumps and logs.

- Called by: `verdict` keeps what these functions return.
- Invariant: JSON in UTF-8 can represent the result, which shares nothing with the returned dict. What cannot be kept is
  replaced by a text that reports it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import orjson

MAX_ENTRIES = 1000
"""The number of entries of a reward dict that are kept, in addition to the one that is trained on."""
MAX_VALUES = 10_000
"""The most values in one entry; MAX_BYTES is the most bytes of one."""
MAX_BYTES = 64 * 1024
_MAX_DEPTH = 20
MORE = "..."
"""The key under which a dict of more than MAX_ENTRIES entries reports the rest."""


class _Left(Exception):
    """An entry that cannot be kept; the message gives the reason."""


def finite(value: object) -> float | None:
    """Convert `value` to a float, also numpy's numbers, a bool or a 0-d tensor; None if it is no finite number."""
    if value is None or isinstance(value, str | bytes | bytearray):
        return None
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def plain_entries(entries: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the first MAX_ENTRIES entries as plain data, with their keys as text.

    Raises:
        ValueError: two keys are equal as text.
    """
    kept: dict[str, Any] = {}
    for key, value in entries.items():
        name = plain_text(str(key))
        if name in kept:
            raise ValueError(f"two keys of the reward dict are both {name!r} as text")
        if len(kept) == MAX_ENTRIES:
            kept[MORE] = f"(left out: {len(entries) - MAX_ENTRIES} more entries)"
            break
        kept[name] = _entry(value)
    return kept


def plain_text(text: str) -> str:
    """Replace halves of surrogate pairs, which UTF-8 cannot represent."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _entry(value: object) -> Any:
    try:
        kept = _plain(value, [MAX_VALUES], 0)
        size = len(orjson.dumps(kept))
        if size > MAX_BYTES:
            raise _Left(f"{size} bytes")
    except _Left as error:
        return f"(left out: {error})"
    except Exception as error:  # noqa: BLE001 (a user's object may raise anything; that costs only this entry)
        return plain_text(f"(left out: a {type(value).__name__}, which raised a {type(error).__name__})")
    return kept


def _plain(value: object, values_left: list[int], depth: int) -> Any:
    """Convert a value; `values_left` holds how many more values the entry may have, and is counted down in place."""
    values_left[0] -= 1
    if values_left[0] < 0:
        raise _Left(f"more than {MAX_VALUES} values")
    if depth > _MAX_DEPTH:
        raise _Left(f"nested more than {_MAX_DEPTH} deep")
    match value:
        case None | bool():
            return value
        case str():
            return plain_text(str.__str__(value))
        case int():
            return int(value) if -(2**63) <= value < 2**64 else f"(left out: a number of {value.bit_length()} bits)"
        case float():
            return float(value) if math.isfinite(value) else str(float(value))
        case Mapping():
            items = cast(Mapping[Any, Any], value).items()
            return {plain_text(str(key)): _plain(item, values_left, depth + 1) for key, item in items}
        case list() | tuple() | set() | frozenset():
            return [_plain(item, values_left, depth + 1) for item in cast(list[Any], value)]
        case _ if hasattr(value, "tolist"):  # an array, a tensor, or a number of theirs
            return _plain(cast(Any, value).tolist(), values_left, depth + 1)
        case _:
            number = finite(value)
            if number is None:
                raise _Left(f"a {type(value).__name__}, which is no plain data")
            return number
