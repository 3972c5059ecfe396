"""Log failures of user code: the first of each kind with its whole traceback, further ones as a count.

- Used by: the generation of samples and every reward worker.
- Invariant: a failure that happens a million times adds seven entries to the log.
"""

from __future__ import annotations

import logging
from collections import Counter

from slime.core.user_code import described, place_of

_MAX_KINDS = 1000
"""The number of kinds that are told apart."""


class FailureLog:
    """Counts failures by type and place, and writes them to `logger`."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._counts: Counter[tuple[str, str | None]] = Counter()

    def add(self, what: str, error: BaseException) -> None:
        """Log that `what` failed with `error`; of equal failures the 1st, 10th, 100th, ... are logged."""
        kind = (type(error).__qualname__, place_of(error))
        if kind not in self._counts and len(self._counts) >= _MAX_KINDS:
            kind = ("others", None)
        self._counts[kind] += 1
        count = self._counts[kind]
        if count == 1:
            self._logger.error("%s failed: %s", what, described(error), exc_info=error)
        elif str(count).strip("0") == "1":
            self._logger.error("%s failed: %s (%d failures like this so far)", what, described(error), count)
