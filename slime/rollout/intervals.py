"""Where a rollout's wall time goes: generating, then judging what is left to judge.

Path: `collect` marks each request and each reward call; the sums become `time/generation` and `time/reward`.
Invariant: the two are disjoint, so that together they never exceed the wall time: an instant with a request in flight
is generation, one with only rewards pending is reward, and any other is nobody's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager


class PhaseIntervals:
    """`clock` gives seconds; only differences count."""

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
        """One request is in flight."""
        self._advance()
        self._generating += 1
        try:
            yield
        finally:
            self._advance()
            self._generating -= 1

    @contextmanager
    def judging(self) -> Generator[None]:
        """One reward is pending."""
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
