"""Bounded reading of files that a user names: configuration, JSON, data lines.

- Used by: `config`, for config.json, YAML and prompt files.
- Invariant: a read ends in bounded time and memory, whatever the name refers to: a pipe, a device, a directory, a file
  of a terabyte.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, cast

from slime.core.printable import printable

MEBIBYTE = 2**20
MAX_JSON = 128 * MEBIBYTE
"""Bytes of a JSON file in an HF directory; the largest tokenizer.json today has about 35 MB."""
_MAX_DIGITS = 100


def is_file(path: str | Path) -> bool:
    """Return whether a regular file exists; False also for a name that no file could have."""
    return os.path.isfile(path)  # unlike Path.is_file, which raises for a name that is too long


def is_directory(path: str | Path) -> bool:
    """Return whether a directory exists; False also for a name that no directory could have."""
    return os.path.isdir(path)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading, without blocking.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is a pipe, a device or a directory, or the name contains a NUL character.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would block
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("is not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_small(path: str | Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or not a regular file; the message completes "FILE ...".
    """
    with open_regular(path) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"is larger than {limit / MEBIBYTE:g} MiB")
    return content


def read_json_object(path: str | Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """Return the JSON object in a file; a repeated key is an error.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than `limit` bytes, or not a JSON object; the message completes "FILE ...".
    """
    try:
        text = read_small(path, limit).decode("utf-8-sig")
        data: object = json.loads(text, object_pairs_hook=_without_repeats, parse_int=_whole_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not text in UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    if not isinstance(data, dict):
        raise ValueError("holds no JSON object")
    return cast(dict[str, Any], data)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ValueError(f"has the key {printable(repr(twice))} twice in one object")
    return data


def _whole_number(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"has a number of {len(text)} digits")
    return int(text)
