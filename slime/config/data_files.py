"""Data files: rows of jsonl or parquet, all or a slice of them, each with its place in its file.

Path: the rules count and check rows (`data_check`) before anything starts; `rollout.prompts` makes prompts of the same
rows. Invariant: the same rows come out the same from both formats, as plain Python values. (A parquet struct has all
its fields in every row: those that are null are left out, as a JSON line leaves them out.)
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import orjson

from slime.config.args import Args

JSONL = (".jsonl", ".json")
PARQUET = (".parquet",)
SUFFIXES = (*JSONL, *PARQUET)


@dataclass(frozen=True, kw_only=True)
class DataKeys:
    """Where a row has what."""

    input_key: str
    label_key: str | None
    metadata_key: str
    tool_key: str | None

    @classmethod
    def of(cls, args: Args, *, input_key: str, label_key: str | None) -> DataKeys:
        """What an evaluation set may have of its own, and what holds for all."""
        return cls(input_key=input_key, label_key=label_key, metadata_key=args.metadata_key, tool_key=args.tool_key)

    @property
    def names(self) -> list[str]:
        """All of them: what is read of a parquet file."""
        given = (self.input_key, self.label_key, self.metadata_key, self.tool_key)
        return list(dict.fromkeys(name for name in given if name is not None))


class DataError(ValueError):
    """What is wrong with a file or a row of it: where, the rule, and the remedy."""

    def __init__(self, where: str, rule: str, remedy: str) -> None:
        super().__init__(where, rule, remedy)
        self.where, self.rule, self.remedy = where, rule, remedy

    def __str__(self) -> str:
        return f"{self.where}: {self.rule}; {self.remedy}"


@dataclass(frozen=True)
class Row:
    """`number`: its line in a jsonl file, counted from 1; its row in a parquet file, counted from 0 as slices do."""

    where: str
    number: int
    data: dict[str, Any]


def split_slice(path: str) -> tuple[str, slice]:
    """`"data.jsonl@[10:20]"` -> `("data.jsonl", slice(10, 20))`; without one, all rows. Bounds as Python's.

    Raises:
        ValueError: what stands behind @ is not a slice.
    """
    match = re.fullmatch(r"(.*)@(\[.*)", path)
    if match is None:
        return path, slice(None)
    bounds = re.fullmatch(r"\[(-?\d*):(-?\d*)\]", match[2])
    if bounds is None or "-" in bounds.groups():
        raise ValueError(f"{path}: {match[2]} is not a slice; write path@[start:stop], either of them may be left out")
    start, stop = (int(text) if text else None for text in bounds.groups())
    return match[1], slice(start, stop)


def count_rows(path: str) -> int:
    """Rows of `path`, within its slice; nothing of them is checked.

    Raises:
        ValueError: the slice or the file cannot be read.
    """
    file, chosen = split_slice(path)
    total = _open_parquet(file).metadata.num_rows if _is_parquet(file) else len(_lines(file))
    return len(range(total)[chosen])


def read_rows(path: str, keys: DataKeys) -> Iterator[Row | DataError]:
    """The rows of `path` in order; a jsonl line that is no object comes as its error.

    A slice counts the lines of a jsonl file that are not blank, and the rows of a parquet file.

    Raises:
        DataError: the file cannot be read, or it is a parquet file without the columns of input and label.
        ValueError: the slice cannot be read.
    """
    file, chosen = split_slice(path)
    return _parquet_rows(file, chosen, keys) if _is_parquet(file) else _json_rows(file, chosen)


def _is_parquet(file: str) -> bool:
    suffix = Path(file).suffix
    if suffix not in SUFFIXES:
        raise DataError(file, f"{suffix or 'no suffix'} is no kind of data file", f"name one in {', '.join(SUFFIXES)}")
    return suffix in PARQUET


def _unreadable(file: str, error: Exception) -> DataError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).split("\n")[0]
    return DataError(file, f"cannot be read ({reason})", "name a readable jsonl or parquet file")


# --- jsonl ------------------------------------------------------------------------------------------------------


def _lines(file: str) -> list[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from error
    return [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]


def _json_rows(file: str, chosen: slice) -> Iterator[Row | DataError]:
    remedy = "write one JSON object a line"
    for number, line in _lines(file)[chosen]:
        where = f"{file}:{number}"
        try:
            data = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            yield DataError(where, f"not JSON ({error})", remedy)
            continue
        if isinstance(data, dict):
            yield Row(where, number, cast(dict[str, Any], data))
        else:
            yield DataError(where, "not a JSON object", remedy)


# --- parquet ----------------------------------------------------------------------------------------------------


def _open_parquet(file: str) -> Any:
    """A pyarrow.parquet.ParquetFile. (pyarrow has no types and takes a moment to import: only here, and only now.)"""
    arrow: Any = importlib.import_module("pyarrow")
    try:
        return importlib.import_module("pyarrow.parquet").ParquetFile(file)
    except (arrow.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _parquet_rows(file: str, chosen: slice, keys: DataKeys) -> Iterator[Row | DataError]:
    arrow: Any = importlib.import_module("pyarrow")
    parquet = _open_parquet(file)
    columns: list[str] = parquet.schema_arrow.names
    for key, flag in ((keys.input_key, "--input-key"), (keys.label_key, "--label-key")):
        if key is not None and key not in columns:
            raise DataError(file, f"no column {key!r}; it has {', '.join(columns) or 'none'}", f"correct {flag}")
    needed = [name for name in keys.names if name in columns]
    rows = range(parquet.metadata.num_rows)[chosen]
    first = 0  # the first row of the row group
    for group in range(parquet.num_row_groups):
        size = parquet.metadata.row_group(group).num_rows
        part = range(max(rows.start, first), min(rows.stop, first + size))
        if part:
            try:
                table = parquet.read_row_group(group, columns=needed).slice(part.start - first, len(part))
                values: list[dict[str, Any]] = table.to_pylist(maps_as_pydicts="strict")
            except (arrow.ArrowException, OSError, KeyError, ValueError) as error:
                raise _unreadable(f"{file}, rows {part.start} to {part.stop - 1}", error) from error
            for number, value in zip(part, values, strict=True):
                where = f"{file}:row {number}"
                try:
                    yield Row(where, number, {name: _plain(item) for name, item in value.items()})
                except ValueError as error:
                    yield DataError(where, str(error), "store text, numbers, lists and structs of them")
        first += size


def _plain(value: Any) -> Any:
    """What JSON would have given: text, numbers, lists, and dicts without their empty entries."""
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
            return int(value) if value == value.to_integral_value() and abs(value) < 2**63 else float(value)
        case _:
            raise ValueError(f"a value of type {type(value).__name__}")
