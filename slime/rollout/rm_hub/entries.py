"""The entries of a reward dict as plain data: what a reward function returned goes through a pipe, into dumps and logs.

Path: `verdict` keeps what comes from here. Invariant: JSON in UTF-8 can write it, nothing in it is shared with what was
returned, and what could not be kept is there as a text that says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import orjson

MAX_ENTRIES = 1000
"""Entries of a reward dict that are kept, beyond the one that is trained on."""
MAX_VALUES = 10_000
"""Values within one entry, and the bytes of one, below."""
MAX_BYTES = 64 * 1024
_MAX_DEPTH = 20
MORE = "..."
"""The key under which a dict of more than MAX_ENTRIES says so."""


class _Left(Exception):
    """An entry cannot be kept; the message says why."""


def finite(value: object) -> float | None:
    """`value` as a number, also numpy's, a bool or a 0-d tensor; None where it is none, or not finite."""
    if value is None or isinstance(value, str | bytes | bytearray):
        return None
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def plain_entries(entries: Mapping[Any, Any]) -> dict[str, Any]:
    """The first MAX_ENTRIES entries, by keys that are text, each as plain data.

    Raises:
        ValueError: two keys are the same as text.
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
    """`text` without halves of surrogate pairs, which UTF-8 cannot write."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _entry(value: object) -> Any:
    try:
        kept = _plain(value, [MAX_VALUES], 0)
        size = len(orjson.dumps(kept))
        if size > MAX_BYTES:
            raise _Left(f"{size} bytes")
    except _Left as error:
        return f"(left out: {error})"
    except Exception as error:  # noqa: BLE001 (an object of the user's may raise anything; it costs this entry only)
        return plain_text(f"(left out: a {type(value).__name__}, which raised a {type(error).__name__})")
    return kept


def _plain(value: object, values_left: list[int], depth: int) -> Any:
    """`values_left`: how many values more it may have, counted down in place."""
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
