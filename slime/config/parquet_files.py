"""The reader of parquet files: every column of each row, in JSON's types.

- Used by: `data_files`.
- Invariant: a row equals the row of a jsonl file with the same values. (A struct has all its fields in every row; null
  fields are left out, because a JSON line leaves them out.)
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, cast

from slime.config.data_rows import MISSING, DataError, DataKeys, Row, find, unreadable
from slime.config.row_values import value_fault
from slime.config.small_floats import column_reader, largest_exact
from slime.core.small_files import open_regular

logger = logging.getLogger(__name__)

_KINDS = "store text, numbers, lists and structs of them"
_AT_ONCE = 4096
"""The number of rows that are made into Python values at once; a reader of the first rows alone stays quick."""


def _open_parquet(file: str) -> Any:
    """Return a pyarrow.parquet.ParquetFile. It imports pyarrow only now, because that has no types and is slow."""
    arrow: Any = importlib.import_module("pyarrow")
    try:
        open_regular(file).close()
        return importlib.import_module("pyarrow.parquet").ParquetFile(file)
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise unreadable(file, error) from error


def count_parquet_rows(file: str) -> int:
    """Return the number of rows in the file. Raises DataError if it cannot be read."""
    return _open_parquet(file).metadata.num_rows


def parquet_rows(file: str, chosen: slice, keys: DataKeys) -> Iterator[Row | DataError]:
    """Yield the chosen rows in order; a row that cannot be read is yielded as its error.

    In columns that no key names, a value that JSON cannot express, such as NaN, is read as null, and columns of bytes
    (images) are not read.

    Raises:
        DataError: the file cannot be read, or has no columns of prompt and label.
    """
    arrow: Any = importlib.import_module("pyarrow")
    parquet = _open_parquet(file)
    columns_read = _Columns(file, parquet.schema_arrow, keys)
    rows = range(parquet.metadata.num_rows)[chosen]
    first = 0  # the first row of the row group
    for group in range(parquet.num_row_groups):
        size = parquet.metadata.row_group(group).num_rows
        part = range(max(rows.start, first), min(rows.stop, first + size))
        if part:
            try:
                names = columns_read.named + columns_read.others
                table = parquet.read_row_group(group, columns=names).slice(part.start - first, len(part))
            except (arrow.ArrowException, OSError, ValueError) as error:
                raise unreadable(f"{file}, rows {part.start} to {part.stop - 1}", error) from error
            for start in range(0, len(part), _AT_ONCE):
                yield from columns_read.rows(file, part[start : start + _AT_ONCE], table.slice(start, _AT_ONCE))
        first += size


def _python_rows(table: Any) -> Iterator[dict[str, Any] | Exception]:
    """Yield the rows as Python values.

    If the table cannot be converted at once, rows are converted one by one, and a failing row yields its exception.
    """
    try:
        yield from table.to_pylist(maps_as_pydicts="strict")
        return
    except (
        ArithmeticError,
        LookupError,
        ValueError,
        RecursionError,
    ):  # for example a date in the year 10**6, a repeated key, or bytes that are not UTF-8
        logger.debug("reading %d rows one by one", table.num_rows, exc_info=True)
    for number in range(table.num_rows):
        try:
            yield table.slice(number, 1).to_pylist(maps_as_pydicts="strict")[0]
        except (ArithmeticError, LookupError, ValueError, RecursionError) as error:
            yield error


def _python_values(column: Any) -> list[Any]:
    """Return a column's values as Python values, with None for those that cannot be converted."""
    try:
        return column.to_pylist(maps_as_pydicts="strict")
    except (ArithmeticError, LookupError, ValueError, RecursionError):
        logger.debug("reading %d values one by one", len(column), exc_info=True)
    values: list[Any] = []
    for number in range(len(column)):
        try:
            values += column.slice(number, 1).to_pylist(maps_as_pydicts="strict")
        except (ArithmeticError, LookupError, ValueError, RecursionError):
            values.append(None)
    return values


class _Columns:
    """The columns that are read from a parquet file; it makes Rows of pyarrow's values."""

    def __init__(self, file: str, schema: Any, keys: DataKeys) -> None:
        kinds = {field.name: field.type for field in schema}
        twice = {name for name in kinds if schema.names.count(name) > 1}
        for key, flag in ((keys.input_key, "--input-key"), (keys.label_key, "--label-key")):
            if key is not None and _type_of(kinds, key) is MISSING:
                listed = ", ".join(_leaves(kinds)) if "." in key else ", ".join(kinds)
                raise DataError(file, f"no column {key!r}; it has {listed or 'none'}", f"correct {flag}")
        self.named = [name for name in kinds if any(_leads_to(name, key) for key in keys.names)]
        """The columns with the values under the keys."""
        if repeated := twice & set(self.named):
            raise DataError(file, f"two columns are called {min(repeated)!r}", "rename one of the two")
        left = [name for name in kinds if name not in self.named and name not in twice]
        self.others = [name for name in left if _is_plain(kinds[name])]
        self._readers = {name: reader for name, kind in kinds.items() if (reader := column_reader(kind)) is not None}
        self._label = keys.label_key
        self._largest = None if keys.label_key is None else largest_exact(_type_of(kinds, keys.label_key))

    def rows(self, file: str, numbers: range, table: Any) -> Iterator[Row | DataError]:
        """Yield the rows of a table, whose numbers in the file are `numbers`."""
        named = _python_rows(table.select(self.named))
        others = {name: _python_values(table[name]) for name in self.others}
        for place, (number, value) in enumerate(zip(numbers, named, strict=True)):
            more = {name: values[place] for name, values in others.items()}
            yield self._row(f"{file}:row {number}", number, value, more)

    def _row(self, where: str, number: int, value: dict[str, Any] | Exception, more: dict[str, Any]) -> Row | DataError:
        """Return one row as a Row, or its error. `value` and `more`: pyarrow's values in the two kinds of columns."""
        if isinstance(value, Exception):
            return DataError(where, f"cannot be read ({value})", _KINDS)
        try:
            data = {name: _plain(self._written(name, item)) for name, item in value.items()}
        except ValueError as error:
            return DataError(where, str(error), _KINDS)
        label = None if self._label is None else find(data, self._label)
        if self._largest is not None and isinstance(label, int | float) and self._largest <= abs(label) < math.inf:
            rule = f"{self._label!r} is {label!r}: its column cannot represent all integers from {self._largest:.0f} on"
            return DataError(where, rule, "store labels as text")
        fault = value_fault(data)
        if fault is not None:
            return DataError(where, *fault)
        return Row(where, number, data | self._usable(more))

    def _usable(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values, with None for those that JSON cannot express."""
        found: dict[str, Any] = {}
        for name, item in values.items():
            try:
                plain = _plain(self._written(name, item))
            except ValueError:
                logger.debug("a value in column %s is read as null", name, exc_info=True)
                plain = None
            found[name] = None if value_fault([[plain]]) is not None else plain
        return found

    def _written(self, name: str, value: Any) -> Any:
        """Return the value as it was written, if its column stores fewer digits than Python's numbers have."""
        return self._readers[name](value) if name in self._readers else value


def _leads_to(column: str, key: str) -> bool:
    return key == column or key.startswith(f"{column}.")


def _fields(kind: Any) -> dict[str, Any]:
    """Return the types of a struct's fields by name; empty for any other type."""
    types: Any = importlib.import_module("pyarrow").types
    return {field.name: field.type for field in kind} if types.is_struct(kind) else {}


def _type_of(kinds: dict[str, Any], key: str) -> Any:
    """Return the type under `key`, which leads into structs like `find` into objects; MISSING if there is none.

    A map can have any key, so what lies inside it is only known row by row: its type is returned.
    """
    if key in kinds:
        return kinds[key]
    for outer, kind in kinds.items():
        if key.startswith(f"{outer}."):
            inner = _fields(kind)
            found = _type_of(inner, key[len(outer) + 1 :]) if inner else kind if _is_map(kind) else MISSING
            if found is not MISSING:
                return found
    return MISSING


def _is_map(kind: Any) -> bool:
    return importlib.import_module("pyarrow").types.is_map(kind)


def _leaves(kinds: dict[str, Any]) -> Iterator[str]:
    """Yield the names of columns, with dots for those inside a struct."""
    for name, kind in kinds.items():
        inner = _fields(kind)
        yield from (f"{name}.{leaf}" for leaf in _leaves(inner)) if inner else (name,)


def _is_plain(kind: Any) -> bool:
    """Return whether a column that no key names is read: all types but bytes (images), durations and unions."""
    types: Any = importlib.import_module("pyarrow").types
    odd = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_duration, types.is_union)
    inner: list[Any] = list(_fields(kind).values())
    if types.is_map(kind):
        inner = [kind.key_type, kind.item_type]
    elif hasattr(kind, "value_type"):  # lists of each kind, dictionaries, run-end encoded columns
        inner = [kind.value_type]
    return not any(is_odd(kind) for is_odd in odd) and all(_is_plain(each) for each in inner)


def _plain(value: Any) -> Any:
    """Return the value in JSON's types: text, numbers, lists, and dicts without their empty entries."""
    match value:
        case None | bool() | str() | int() | float():
            return value
        case dict():
            items = cast(dict[Any, Any], value).items()
            return {str(key): _plain(item) for key, item in items if item is not None}
        case list():
            return [_plain(item) for item in cast(list[Any], value)]
        case bytes():
            return value.decode()
        case datetime() | date() | time():
            return value.isoformat()
        case Decimal():
            return int(value) if value.is_finite() and value == value.to_integral_value() else float(value)
        case _:
            raise ValueError(f"a value of type {type(value).__name__}")
