"""Restore numbers of float32 and float16 columns as they were written: 123.45 for the stored 123.44999694824219.

- Used by: `data_files`, for the columns of a parquet file.
- Invariant: a number has the fewest digits that its own type reads back as the same number. NaN and infinity stay.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

Reader = Callable[[Any], Any]
"""A function that turns a value of a column into the value that was written; None stays None."""


def column_reader(kind: Any) -> Reader | None:
    """Return the reader of a pyarrow type; None if the type has no float32 or float16 in it."""
    types: Any = importlib.import_module("pyarrow").types
    number = _number_type(kind)
    if number is not None:
        return lambda value: float(str(number(value))) if value is not None and math.isfinite(value) else value
    if types.is_struct(kind):
        return _struct_reader({field.name: column_reader(field.type) for field in kind})
    if types.is_map(kind):
        return _map_reader(column_reader(kind.key_type), column_reader(kind.item_type))
    if hasattr(kind, "value_type"):  # lists of each kind, dictionaries, run-end encoded columns
        inner = column_reader(kind.value_type)
        nested = "list" in str(kind).partition("<")[0]
        return _list_reader(inner) if inner is not None and nested else inner
    return None


def largest_exact(kind: Any) -> float | None:
    """Return the number from which a float32 or float16 column skips integers; None for any other type."""
    number = _number_type(kind)
    if number is None:
        return None
    return 2.0 ** (importlib.import_module("numpy").finfo(number).nmant + 1)


def _number_type(kind: Any) -> Any:
    """Return numpy's type of a float32 or float16 column; None for any other type."""
    types: Any = importlib.import_module("pyarrow").types
    numpy: Any = importlib.import_module("numpy")
    return numpy.float32 if types.is_float32(kind) else numpy.float16 if types.is_float16(kind) else None


def _list_reader(inner: Reader) -> Reader:
    return lambda value: None if value is None else [inner(item) for item in value]


def _struct_reader(fields: dict[str, Reader | None]) -> Reader | None:
    readers = {name: reader for name, reader in fields.items() if reader is not None}
    if not readers:
        return None

    def read(value: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if value is None else value | {name: reader(value[name]) for name, reader in readers.items()}

    return read


def _map_reader(keys: Reader | None, items: Reader | None) -> Reader | None:
    if keys is None and items is None:
        return None

    def read(value: dict[Any, Any] | None) -> dict[Any, Any] | None:
        if value is None:
            return None
        return {(key if keys is None else keys(key)): (v if items is None else items(v)) for key, v in value.items()}

    return read
