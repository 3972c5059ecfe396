"""The check of every row of a data file, before anything starts.

- Used by: `files`; `rollout.prompts` refuses the same rows, by `data_rows.row_error`.
- Invariant: a row that passes here can be made into a Sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from slime.config.data_files import read_rows
from slime.config.data_rows import MISSING, DataError, DataKeys, Row, find, row_error
from slime.config.problem import Problem

MAX_REPORTED = 5

RowCheck = Callable[[dict[str, Any]], tuple[str, str] | None]
"""A function that returns rule and remedy for a well-formed row that still cannot be used, and None otherwise."""


def check_rows(
    paths: str | Sequence[str],
    keys: DataKeys,
    *,
    chat_template: bool,
    needs: tuple[str, ...] = (),
    check: RowCheck | None = None,
    most: int | None = None,
) -> list[Problem]:
    """Return the first five errors with file and line (or row), and the number of further ones.

    Each path may end in a slice. `needs`: keys that were given by a flag, so that at least one row must have each of
    them. `check` is called with every well-formed row. `most`: the most
    rows of a file that are read; None: all.
    """
    errors: list[DataError] = []
    missing = set(needs)
    total = wrong = 0
    paths = [paths] if isinstance(paths, str) else list(paths)
    for path in paths:
        before = total
        try:
            for row in islice(read_rows(path, keys), most):
                total += 1
                error = row_error(row, keys, chat_template=chat_template)
                if error is None and check and isinstance(row, Row) and (fault := check(row.data)) is not None:
                    error = DataError(row.where, *fault)
                if error is not None:
                    wrong += 1
                    errors += [error] if wrong <= MAX_REPORTED else []
                elif isinstance(row, Row):
                    missing -= {key for key in missing if find(row.data, key) is not MISSING}
        except DataError as error:
            return [*map(_problem, errors), _problem(error)]
        if total == before:
            empty = DataError(path, "has no rows", "add rows, or name another file or slice")
            return [*map(_problem, errors), _problem(empty)]
    problems = [_problem(error) for error in errors]
    if wrong > MAX_REPORTED:
        more = f"{wrong - MAX_REPORTED} more of {total} rows cannot be used"
        problems.append(_problem(DataError(" ".join(paths), more, "correct them as well")))
    elif not errors and most is None:
        where = " ".join(paths)
        problems += [_problem(DataError(where, f"no row has {key!r}", "correct its flag")) for key in sorted(missing)]
    return problems


def _problem(error: DataError) -> Problem:
    return Problem(severity="error", where=error.where, rule=error.rule, remedy=error.remedy)
