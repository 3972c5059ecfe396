"""The check of every row of a data file, before anything starts.

- Used by: `files`, in real runs; `rollout.prompts` refuses the same rows, by `data_files.row_error`.
- Invariant: a row that passes here can be made into a Sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slime.config.data_files import DataError, DataKeys, Row, read_rows, row_error
from slime.config.problem import Problem

MAX_REPORTED = 5

RowCheck = Callable[[dict[str, Any]], tuple[str, str] | None]
"""A function that returns rule and remedy for a well-formed row that still cannot be used, and None otherwise."""


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
