"""Messages: dataclasses that convert to and from JSON, and check what comes in.

- Used by: the bodies of `protocol` and `device_protocol` are Messages; a server makes them from the requests it gets.
- Invariant: a Message made from JSON has the types that it declares, 64-bit integers and finite floats, so that code
  after it need not check again.
"""

from __future__ import annotations

import functools
import math
import re
import reprlib
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

INT64 = range(-(2**63), 2**63)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def short(value: object) -> str:
    """Return the value as an error shows it: its beginning, however long or deep it is."""
    return _SHORT.repr(value)[:200]


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raise ValueError with name, value and rule unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} is {short(value)}; it has to be {rule}")


class Message:
    """The body of a request. None means "not sent"; `Message()` is an empty body."""

    @classmethod
    def from_json(cls, data: Any) -> Any:
        """Build from a decoded JSON object.

        Raises:
            ValueError: not an object, an unknown field, a missing one, or one of another type.
        """
        name = cls.__name__
        if not isinstance(data, Mapping):
            raise ValueError(f"{name}: the body is {type(data).__name__}, it has to be a JSON object")
        known = {f.name for f in fields(cls)}  # pyright: ignore[reportArgumentType]
        unknown = sorted(set(cast(Mapping[str, Any], data)) - known)
        if unknown:
            listed = ", ".join(short(field).strip("'") for field in unknown[:5])
            raise ValueError(f"{name} has no field {listed}; its fields are {', '.join(sorted(known))}")
        hints = _hints(cls)
        for field, value in cast(Mapping[str, Any], data).items():
            require(fits(value, hints[field]), field, value, _in_words(hints[field]))
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"{name}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if v is not None}


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _in_words(hint: Any) -> str:
    return (
        hint.__name__ if isinstance(hint, type) and not get_args(hint) else re.sub(r"[a-z.]+\.(?=[A-Z])", "", str(hint))
    )


def fits(value: Any, hint: Any) -> bool:
    """Return whether a JSON value has the declared type; a message within a message was built before."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in get_args(hint))
    if origin in (list, Sequence):
        [item] = get_args(hint)
        if not isinstance(value, list | tuple):
            return False
        elements = cast(Sequence[Any], value)
        if item is int and all(type(element) is int for element in elements):  # a long prompt: fast path
            return not elements or (min(elements) in INT64 and max(elements) in INT64)
        return all(fits(element, item) for element in elements)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and value in INT64
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    return hint is Any or isinstance(value, hint)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer larger than every float
        return False
