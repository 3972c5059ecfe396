"""The reader of data files: rows of jsonl or parquet, all of them or a slice, each with its place in the file.

- Used by: the rules, which count and check rows before anything starts, and `rollout.prompts`, which makes prompts of
  the same rows.
- Invariant: equal rows give equal plain Python values in both formats. (In parquet, a struct has all its fields in
  every row; null fields are left out, because a JSON line leaves them out.)
"""

from __future__ import annotations

import codecs
import importlib
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, cast

import orjson

from slime.config.args import Args
from slime.config.messages import messages_fault
from slime.config.row_values import line_fault, value_fault
from slime.config.small_floats import column_reader, largest_exact
from slime.core.small_files import MEBIBYTE, open_regular

logger = logging.getLogger(__name__)

JSONL = (".jsonl", ".json")
PARQUET = (".parquet",)
SUFFIXES = (*JSONL, *PARQUET)
MAX_LINE = 32 * MEBIBYTE
"""The largest number of bytes in a line. A million tokens need far fewer; a file without line ends is refused."""

_OTHER_KINDS: Mapping[bytes, str] = {
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a parquet file, which has the suffix .parquet",
    codecs.BOM_UTF16_LE: "text in UTF-16",
    codecs.BOM_UTF16_BE: "text in UTF-16",
}
_KINDS = "store text, numbers, lists and structs of them"


@dataclass(frozen=True, kw_only=True)
class DataKeys:
    """The keys under which a row has its prompt, label, metadata and tools."""

    input_key: str
    label_key: str | None
    metadata_key: str
    tool_key: str | None

    @classmethod
    def of(cls, args: Args, *, input_key: str, label_key: str | None) -> DataKeys:
        """Return the keys of a data file; the metadata and tool keys are the same for all files."""
        return cls(input_key=input_key, label_key=label_key, metadata_key=args.metadata_key, tool_key=args.tool_key)

    @property
    def names(self) -> list[str]:
        """Return all keys, which are the columns that are read from a parquet file."""
        given = (self.input_key, self.label_key, self.metadata_key, self.tool_key)
        return list(dict.fromkeys(name for name in given if name is not None))


class DataError(ValueError):
    """A fault of a file or of one of its rows, with place, rule and remedy."""

    def __init__(self, where: str, rule: str, remedy: str) -> None:
        super().__init__(where, rule, remedy)
        self.where, self.rule, self.remedy = where, rule, remedy

    def __str__(self) -> str:
        return f"{self.where}: {self.rule}; {self.remedy}"


@dataclass(frozen=True)
class Row:
    """One row of a data file.

    `number`: the line in a jsonl file, counted from 1, or the row in a parquet file, counted from 0 like slices.
    """

    where: str
    number: int
    data: dict[str, Any]


def split_slice(path: str) -> tuple[str, slice]:
    """Split `"data.jsonl@[10:20]"` into `("data.jsonl", slice(10, 20))`.

    Without a slice, all rows are chosen. Bounds have the meaning of Python's.

    Raises:
        ValueError: the text after the @ is not a slice.
    """
    match = re.fullmatch(r"(.*)@(\[.*)", path, re.DOTALL)
    if match is None:
        return path, slice(None)
    bounds = re.fullmatch(r"\[(-?[0-9]{0,18}):(-?[0-9]{0,18})\]", match[2])
    if bounds is None or "-" in bounds.groups():
        raise ValueError(f"{path}: {match[2]} is not a slice; write path@[start:stop], where both may be left out")
    start, stop = (int(text) if text else None for text in bounds.groups())
    return match[1], slice(start, stop)


def count_rows(path: str) -> int:
    """Return the number of rows in `path` within its slice, without checking them.

    Raises:
        ValueError: the slice or the file cannot be read.
    """
    file, chosen = split_slice(path)
    return len(range(_open_parquet(file).metadata.num_rows if _is_parquet(file) else _count_lines(file))[chosen])


def read_rows(path: str, keys: DataKeys) -> Iterator[Row | DataError]:
    """Yield the rows of `path` in order; a jsonl line that is not an object is yielded as its error.

    A slice counts the lines of a jsonl file that are not blank, and the rows of a parquet file.

    Raises:
        DataError: the file cannot be read, or it is a parquet file without the columns of prompt and label.
        ValueError: the slice cannot be read.
    """
    file, chosen = split_slice(path)
    return _parquet_rows(file, chosen, keys) if _is_parquet(file) else _json_rows(file, chosen, keys)


def _is_parquet(file: str) -> bool:
    suffix = Path(file).suffix
    if suffix not in SUFFIXES:
        raise DataError(
            file, f"{suffix or 'no suffix'} is not a known type of data file", f"name one in {', '.join(SUFFIXES)}"
        )
    return suffix in PARQUET


def _unreadable(file: str, error: Exception) -> DataError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).split("\n")[0]
    return DataError(file, f"cannot be read ({reason})", "name a readable jsonl or parquet file")


# --- jsonl ------------------------------------------------------------------------------------------------------


def _lines(file: str) -> Iterator[tuple[int, bytes]]:
    """Yield the non-blank lines with their numbers, counted from 1.

    Raises:
        DataError: the file cannot be read, has another format, or has a line that is too long.
    """
    try:
        with open_regular(file) as stream:
            _refuse_other_kind(file, stream.read(8))
            stream.seek(0)
            number = 0
            while line := stream.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    rule = f"the line is longer than {MAX_LINE // MEBIBYTE} MiB"
                    raise DataError(f"{file}:{number}", rule, "shorten or remove it")
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield number, line
    except (OSError, ValueError) as error:
        raise error if isinstance(error, DataError) else _unreadable(file, error) from error


def _refuse_other_kind(file: str, beginning: bytes) -> None:
    for mark, kind in _OTHER_KINDS.items():
        if beginning.startswith(mark):
            raise DataError(file, f"is {kind}, judging by its first bytes", "name a file of JSON lines in UTF-8")


def _count_lines(file: str) -> int:
    return sum(1 for _ in _lines(file))


def _bounds(file: str, chosen: slice) -> tuple[int, int]:
    """Return the first line of the slice and the one after its last, counting non-blank lines only."""
    start, stop = chosen.start or 0, sys.maxsize if chosen.stop is None else chosen.stop
    if start < 0 or stop < 0:
        part = range(_count_lines(file))[chosen]
        return part.start, max(part.start, part.stop)
    return start, max(start, stop)


def _json_rows(file: str, chosen: slice, keys: DataKeys) -> Iterator[Row | DataError]:
    remedy = "write one JSON object per line"
    for number, line in islice(_lines(file), *_bounds(file, chosen)):
        where = f"{file}:{number}"
        try:
            data = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            yield DataError(where, f"not JSON ({error})", remedy)
            continue
        if not isinstance(data, dict):
            yield DataError(where, "not a JSON object", remedy)
        elif (fault := line_fault(line, keys.names)) is not None:
            yield DataError(where, *fault)
        else:
            yield Row(where, number, cast(dict[str, Any], data))


# --- parquet ----------------------------------------------------------------------------------------------------


def _open_parquet(file: str) -> Any:
    """Return a pyarrow.parquet.ParquetFile. It imports pyarrow only now, because that has no types and is slow."""
    arrow: Any = importlib.import_module("pyarrow")
    try:
        open_regular(file).close()
        return importlib.import_module("pyarrow.parquet").ParquetFile(file)
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise _unreadable(file, error) from error


def _parquet_rows(file: str, chosen: slice, keys: DataKeys) -> Iterator[Row | DataError]:
    arrow: Any = importlib.import_module("pyarrow")
    parquet = _open_parquet(file)
    columns: list[str] = parquet.schema_arrow.names
    for key, flag in ((keys.input_key, "--input-key"), (keys.label_key, "--label-key")):
        if key is not None and key not in columns:
            raise DataError(file, f"no column {key!r}; it has {', '.join(columns) or 'none'}", f"correct {flag}")
    needed = [name for name in keys.names if name in columns]
    columns_read = _Columns(parquet.schema_arrow, needed, keys.label_key)
    rows = range(parquet.metadata.num_rows)[chosen]
    first = 0  # the first row of the row group
    for group in range(parquet.num_row_groups):
        size = parquet.metadata.row_group(group).num_rows
        part = range(max(rows.start, first), min(rows.stop, first + size))
        if part:
            try:
                table = parquet.read_row_group(group, columns=needed).slice(part.start - first, len(part))
            except (arrow.ArrowException, OSError, ValueError) as error:
                raise _unreadable(f"{file}, rows {part.start} to {part.stop - 1}", error) from error
            for number, value in zip(part, _python_rows(table), strict=True):
                yield columns_read.row(f"{file}:row {number}", number, value)
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


class _Columns:
    """The columns that are read from a parquet file; it makes Rows of pyarrow's values."""

    def __init__(self, schema: Any, names: list[str], label: str | None) -> None:
        kinds = {name: schema.field(name).type for name in names}
        self._readers = {name: reader for name, kind in kinds.items() if (reader := column_reader(kind)) is not None}
        self._label = label
        self._largest = None if label is None else largest_exact(kinds[label])

    def row(self, where: str, number: int, value: dict[str, Any] | Exception) -> Row | DataError:
        """Return one row of pyarrow's values as a Row, or its error."""
        if isinstance(value, Exception):
            return DataError(where, f"cannot be read ({value})", _KINDS)
        try:
            data = {name: _plain(item) for name, item in self._written(value).items()}
        except ValueError as error:
            return DataError(where, str(error), _KINDS)
        label = None if self._label is None else data[self._label]
        if self._largest is not None and label is not None and self._largest <= abs(label) < math.inf:
            rule = f"{self._label!r} is {label!r}: its column cannot represent all integers from {self._largest:.0f} on"
            return DataError(where, rule, "store labels as text")
        fault = value_fault(data)
        return Row(where, number, data) if fault is None else DataError(where, *fault)

    def _written(self, value: dict[str, Any]) -> dict[str, Any]:
        """Return the values as they were written, if a column stores fewer digits than Python's numbers have."""
        return value | {name: reader(value[name]) for name, reader in self._readers.items()}


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


MAX_EXACT = 2.0**53
"""The limit from which floats skip integers. An integer of more than 64 bits is read as a float."""


def row_error(row: Row | DataError, keys: DataKeys, *, chat_template: bool) -> DataError | None:
    """Return why this row cannot be used, or None if it can."""
    if isinstance(row, DataError):
        return row
    fault = _unusable(row.data, keys, chat_template)
    return None if fault is None else DataError(row.where, *fault)


def _unusable(data: dict[str, Any], keys: DataKeys, chat_template: bool) -> tuple[str, str] | None:
    """Return rule and remedy for a row that cannot be used, or None."""
    for key, flag in ((keys.input_key, "--input-key"), (keys.label_key, "--label-key")):
        if key is not None and key not in data:
            return f"no key {key!r}; it has {', '.join(data) or 'none'}", f"correct the line, or {flag}"
    label = None if keys.label_key is None else data[keys.label_key]
    if keys.label_key is not None and not _is_text_or_number(label):
        return f"{keys.label_key!r} is {label!r}, not text or a number", "correct the line, or --label-key"
    if isinstance(label, float) and abs(label) >= MAX_EXACT:
        return f"{keys.label_key!r} is {label!r}: such a long number loses digits when it is read", "write it as text"
    for key, kind, named in ((keys.metadata_key, dict, "an object"), (keys.tool_key, list, "a list")):
        value = None if key is None else data.get(key)
        if value is not None and not isinstance(value, kind):
            return f"{key!r} is {str(value)[:80]!r}, not {named}", "correct the line"
    prompt = data[keys.input_key]
    if not chat_template:
        if not isinstance(prompt, str):
            return f"{keys.input_key!r} is not text", "for OpenAI messages, add --apply-chat-template"
        return None if prompt else (f"{keys.input_key!r} is empty", "remove the line")
    return messages_fault(prompt, keys.input_key)


def _is_text_or_number(label: object) -> bool:
    if isinstance(label, float):
        return math.isfinite(label)
    return isinstance(label, str | int) and not isinstance(label, bool)


def label_text(label: str | float) -> str:
    """Return a label as reward functions receive it. A number is written without exponent: 0.00001, not 1e-05."""
    return f"{Decimal(repr(label)):f}" if isinstance(label, float) else str(label)
