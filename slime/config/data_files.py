"""The reader of data files: rows of jsonl or parquet, all of them or a slice, each with its place in the file.

- Used by: the rules, which count and check rows before anything starts, and `rollout.prompts`, which makes prompts of
  the same rows.
- Invariant: equal rows give equal plain Python values in both formats.
"""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import orjson

from slime.config.data_rows import DataError, DataKeys, Row, unreadable
from slime.config.parquet_files import count_parquet_rows, parquet_rows
from slime.config.row_values import line_fault
from slime.core.small_files import MEBIBYTE, open_regular

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
    return len(range(count_parquet_rows(file) if _is_parquet(file) else _count_lines(file))[chosen])


def read_rows(path: str, keys: DataKeys) -> Iterator[Row | DataError]:
    """Yield the rows of `path` in order; a jsonl line that is not an object is yielded as its error.

    A slice counts the lines of a jsonl file that are not blank, and the rows of a parquet file.

    Raises:
        DataError: the file cannot be read, or it is a parquet file without the columns of prompt and label.
        ValueError: the slice cannot be read.
    """
    file, chosen = split_slice(path)
    return parquet_rows(file, chosen, keys) if _is_parquet(file) else _json_rows(file, chosen, keys)


def _is_parquet(file: str) -> bool:
    suffix = Path(file).suffix
    if suffix not in SUFFIXES:
        raise DataError(
            file, f"{suffix or 'no suffix'} is not a known type of data file", f"name one in {', '.join(SUFFIXES)}"
        )
    return suffix in PARQUET


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
        raise error if isinstance(error, DataError) else unreadable(file, error) from error


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
    names = {part for name in keys.names for part in (name, *name.split("."))}
    for number, line in islice(_lines(file), *_bounds(file, chosen)):
        where = f"{file}:{number}"
        try:
            data = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            yield DataError(where, f"not JSON ({error})", remedy)
            continue
        if not isinstance(data, dict):
            yield DataError(where, "not a JSON object", remedy)
        elif (fault := line_fault(line, names)) is not None:
            yield DataError(where, *fault)
        else:
            yield Row(where, number, cast(dict[str, Any], data))
