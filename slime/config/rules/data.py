"""The check of every row of a data file, before anything starts.

- Used by: the rules, which call `check_rows` in real runs; `rollout.prompts` refuses the same rows.
- Invariant: a row that passes here can be made into a Sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from slime.config.data_files import DataError, DataKeys, Row, read_rows
from slime.config.messages import messages_fault
from slime.config.rules.problem import Problem

MAX_REPORTED = 5
MAX_EXACT = 2.0**53
"""The limit from which floats skip integers. An integer of more than 64 bits is read as a float."""

RowCheck = Callable[[dict[str, Any]], tuple[str, str] | None]
"""A function that returns rule and remedy for a well-formed row that still cannot be used, and None otherwise."""


def row_error(row: Row | DataError, keys: DataKeys, *, chat_template: bool) -> DataError | None:
    """Return why this row cannot be used, or None if it can."""
    if isinstance(row, DataError):
        return row
    fault = _fault(row.data, keys, chat_template)
    return None if fault is None else DataError(row.where, *fault)


def _fault(data: dict[str, Any], keys: DataKeys, chat_template: bool) -> tuple[str, str] | None:
    """Return rule and remedy for a row that cannot be used, or None."""
    for key, flag in ((keys.input_key, "--input-key"), (keys.label_key, "--label-key")):
        if key is not None and key not in data:
            return f"no key {key!r}; it has {', '.join(data) or 'none'}", f"correct the line, or {flag}"
    label = None if keys.label_key is None else data[keys.label_key]
    if keys.label_key is not None and not _is_text_or_number(label):
        return f"{keys.label_key!r} is {label!r}, not text or a number", "correct the line, or --label-key"
    if isinstance(label, float) and abs(label) >= MAX_EXACT:
        return f"{keys.label_key!r} is {label!r}: so long a number loses digits when it is read", "write it as text"
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


def check_rows(
    path: str, keys: DataKeys, *, chat_template: bool, needs: tuple[str, ...] = (), check: RowCheck | None = None
) -> list[Problem]:
    """Return the first five errors with file and line (or row), and the number of further ones.

    `path` may end in a slice. `needs`: keys that were given by a flag, so that at least one row must have each of
    them. `check` is called with every well-formed row.
    """
    errors: list[DataError] = []
    missing = set(needs)
    total = wrong = 0
    try:
        for row in read_rows(path, keys):
            total += 1
            error = row_error(row, keys, chat_template=chat_template)
            if error is None and check is not None and isinstance(row, Row) and (fault := check(row.data)) is not None:
                error = DataError(row.where, *fault)
            if error is not None:
                wrong += 1
                errors += [error] if wrong <= MAX_REPORTED else []
            elif isinstance(row, Row):
                missing.difference_update(row.data)
    except DataError as error:
        return [_problem(error)]
    problems = [_problem(error) for error in errors]
    if wrong > MAX_REPORTED:
        more = f"{wrong - MAX_REPORTED} more of {total} rows cannot be used"
        problems.append(_problem(DataError(path, more, "correct them as well")))
    if not total:
        problems.append(_problem(DataError(path, "has no rows", "add rows, or name another file or slice")))
    elif not errors:
        problems += [_problem(DataError(path, f"no row has {key!r}", "correct its flag")) for key in sorted(missing)]
    return problems


def _problem(error: DataError) -> Problem:
    return Problem(severity="error", where=error.where, rule=error.rule, remedy=error.remedy)
