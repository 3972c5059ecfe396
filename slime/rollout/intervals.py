"""Split a rollout's wall time into generation and reward.

- Called by: `collect` marks each request and each reward call; the sums become `time/generation` and `time/reward`.
- Invariant: the two are disjoint, so together they never exceed the wall time. An instant with a request in flight is
  generation, an instant with only rewards pending is reward, and any other instant is neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager


class PhaseIntervals:
    """Sums the seconds of each phase. `clock` gives seconds; only differences count."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = clock()
        self._generating = 0
        self._judging = 0
        self._generation_seconds = 0.0
        self._reward_seconds = 0.0

    @property
    def requests_in_flight(self) -> int:
        return self._generating

    @property
    def generation_seconds(self) -> float:
        self._advance()
        return self._generation_seconds

    @property
    def reward_seconds(self) -> float:
        self._advance()
        return self._reward_seconds

    @contextmanager
    def generating(self) -> Generator[None]:
        """Count one request as in flight inside the block."""
        self._advance()
        self._generating += 1
        try:
            yield
        finally:
            self._advance()
            self._generating -= 1

    @contextmanager
    def judging(self) -> Generator[None]:
        """Count one reward as pending inside the block."""
        self._advance()
        self._judging += 1
        try:
            yield
        finally:
            self._advance()
            self._judging -= 1

    def _advance(self) -> None:
        now = self._clock()
        if self._generating:
            self._generation_seconds += now - self._since
        elif self._judging:
            self._reward_seconds += now - self._since
        self._since = now
