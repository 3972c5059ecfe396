"""Notice that an engine or a router has died, or hangs.

- Called by: the rollout manager runs `first_death` during every rollout and evaluation, for external processes. The
  `engine_supervisor` runs `first_trouble` for each of the run's own.
- Invariant: a death is reported within a few seconds, by the name of the process, so nothing waits for ever. Time in
  which this event loop itself was blocked counts against no process.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from slime.engine.client import EngineClient

POLL_S = 1.0
UNWELL_S = 5.0
"""Seconds without one good answer, after which an external process counts as dead."""
HEALTH_CHECK_S = 10.0
"""Seconds within which one health check has to be answered."""
RESTARTS_WITHIN_S = 3600.0
"""Seconds within which the restarts of one process are counted."""


@dataclass(frozen=True)
class Watched:
    """A process to watch: `name` describes it in errors, and `is_alive` is called again and again."""

    name: str
    is_alive: Callable[[], Awaitable[bool]]


def answering(what: str, url: str, client: EngineClient) -> Watched:
    """Watch an external process, which is alive as long as it answers."""
    unwell_since: float | None = None

    async def is_alive() -> bool:
        nonlocal unwell_since
        asked = client.clock.time()
        if await client.is_healthy(url, timeout=HEALTH_CHECK_S):
            unwell_since = None
            return True
        unwell_since = asked if unwell_since is None else unwell_since
        return client.clock.time() - unwell_since < UNWELL_S

    return Watched(f"{what} {url}", is_alive)


class EngineWatch:
    """Polls all of `watched` at the same time."""

    def __init__(self, watched: Sequence[Watched]) -> None:
        self._watched = watched

    async def first_death(self) -> str:
        """Wait until something has died, and return a sentence that names it."""
        while True:
            await asyncio.sleep(POLL_S)
            alive = await asyncio.gather(*(each.is_alive() for each in self._watched))
            for each, is_alive in zip(self._watched, alive, strict=True):
                if not is_alive:
                    return f"{each.name} died during generation"


async def first_trouble(
    is_alive: Callable[[], Awaitable[bool]], url: str, client: EngineClient, *, limit: float
) -> str:
    """Wait until the engine or router at `url` is dead, hangs or is stuck, and return a description.

    `limit` is the largest number of seconds without an answer to a health check, --engine-health-timeout.
    """
    clock = client.clock
    answered = clock.time()
    while True:
        await asyncio.sleep(POLL_S)
        if not await is_alive():
            return "has died"
        if await client.is_healthy(url, timeout=min(HEALTH_CHECK_S, limit)):
            answered = clock.time()
        elif clock.time() - answered >= limit:
            return f"has answered no health check for {limit:g} s (--engine-health-timeout)"
        stuck = client.progress.trouble(url)
        if stuck is not None:
            return stuck


class RestartLimit:
    """Counts the restarts of each process within the last hour."""

    def __init__(self, most: int) -> None:
        """`most` is the largest number of restarts of one process within an hour."""
        self._most = most
        self._times: dict[str, deque[float]] = {}

    def allow(self, what: str, *, now: float) -> bool:
        """Return whether `what` may be restarted at `now`, in seconds of any clock; if so, it is counted."""
        times = self._times.setdefault(what, deque())
        while times and now - times[0] >= RESTARTS_WITHIN_S:
            times.popleft()
        if len(times) >= self._most:
            return False
        times.append(now)
        return True
