"""Limit a generation by the time in which no engine makes progress, not by its length.

- Called by: the client wraps every attempt of a generation. `engine_supervisor` asks which engines are stuck. Weight
  transports that wait for requests ask whether these advance.
- Invariant: a response continues as long as engines make progress, however long it gets. Time in which weights change,
  or in which this event loop is blocked, does not count.

The router does not reveal which engine has a request, and a response arrives only as a whole. So each engine is polled
for its load (SGLang's /v1/loads, in all versions from 0.5.16 on), which its scheduler publishes with the batches that
it has computed:

    one poll                 the next poll
    running  used tokens     running  used tokens
       3        1200            3        1290       the load has moved: progress
       3        1290            3        1290       not moved: stuck, if it stays like this
       0           0            0           0       not moved: idle
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from slime.engine.connection import Connection, EngineError
from slime.engine.protocol import Endpoint

LONGEST_LOOK_S = 10.0
"""Seconds between two polls of the engines, and the timeout of one answer; shorter under a short limit."""
MOVES = (
    "num_running_reqs",
    "num_used_tokens",
    "gen_throughput",
    "total_prefill_uncached_tokens",
    "total_prefill_busy_us",
    "decode_moments",
)
"""Fields of the load that change only when the scheduler computes, not when requests arrive or time passes."""


@dataclass
class _Seen:
    """An engine's load when it last changed, and the time of that change."""

    load: object
    since: float
    in_flight: int = 0
    """The number of its requests, running or waiting."""


class Progress:
    """The Limit of a generation's attempts; `limit` is the seconds without progress, --engine-request-timeout."""

    def __init__(self, connection: Connection, engines: Callable[[], Awaitable[list[str]]], limit: float) -> None:
        self._connection = connection
        self._engines = engines
        self._limit = limit
        self.every = min(LONGEST_LOOK_S, limit / 4)
        """Seconds between two polls."""
        self._open: dict[asyncio.Timeout, float] = {}
        self._watching: asyncio.Task[None] | None = None
        self._seen: dict[str, _Seen] = {}
        self._moved = 0.0
        self._held = False
        self.num_moves = 0
        """The number of polls that have found progress so far."""

    # ---- a generation's attempt

    @asynccontextmanager
    async def attempt(self) -> AsyncGenerator[None]:
        """Wrap one attempt; raise TimeoutError once no engine has made progress for too long."""
        async with asyncio.timeout(None) as deadline:
            self._open[deadline] = self._connection.clock.time()
            if self._watching is None or self._watching.done():
                self._watching = asyncio.create_task(self._watch())
            try:
                yield
            finally:
                del self._open[deadline]
                if not self._open and self._watching is not None:
                    self._watching.cancel()  # the next attempt begins with fresh polls
                    self._watching = None

    def passed(self) -> str:
        loads = ", ".join(f"{url} has {seen.in_flight}" for url, seen in self._seen.items())
        return (
            f"no engine has made progress for {self._limit:g} s (--engine-request-timeout); requests that the engines "
            f"report: {loads or 'they do not answer'}"
        )

    async def _watch(self) -> None:
        """Run while anything is in flight."""
        clock = self._connection.clock
        self._moved = clock.time()
        self._seen.clear()
        while True:
            await asyncio.sleep(self.every)
            if await self.look():
                self._moved = clock.time()
            for deadline, begin in list(self._open.items()):
                if clock.time() - max(begin, self._moved) >= self._limit:
                    deadline.reschedule(asyncio.get_running_loop().time())

    # ---- engines

    async def look(self) -> bool:
        """Poll every engine's load; return whether one has changed since the last poll, or weights change now."""
        try:
            urls = await self._engines()
        except EngineError:  # the router failed, which is asked for the engines if the run has not named any
            return False
        loads = await asyncio.gather(*map(self._load, urls))
        now = self._connection.clock.time()
        self._seen = {url: seen for url, seen in self._seen.items() if url in urls}
        moved = self._held
        for url, load in zip(urls, loads, strict=True):
            seen = self._seen.get(url)
            if load is None:
                continue  # no answer; whether the engine is healthy is checked elsewhere
            if seen is None or load[0] != seen.load or self._held:
                self._seen[url] = _Seen(load[0], now, load[1])
                moved = moved or seen is not None
            else:
                seen.in_flight = load[1]
        self.num_moves += moved
        return moved

    def trouble(self, url: str) -> str | None:
        """Return what is wrong with an engine that has requests but made no progress for the limit; None if nothing."""
        seen = self._seen.get(url)
        if seen is None or not seen.in_flight or self._watching is None:
            return None
        if self._connection.clock.time() - seen.since < self._limit:
            return None
        return f"has made no progress with {seen.in_flight} requests for {self._limit:g} s (--engine-request-timeout)"

    def hold(self, held: bool) -> None:
        """Set whether weights change now, so that engines are paused and requests wait."""
        self._held = held

    async def _load(self, url: str) -> tuple[object, int] | None:
        """Return the parts of an engine's load that show progress, and its number of requests; None without an answer.

        An engine without /v1/loads counts as making progress as long as it is healthy.
        """
        answer = await self._connection.ask_once(url + Endpoint.LOADS, timeout=LONGEST_LOOK_S)
        if answer is None:
            return None
        status, body = answer
        if status == 200 and isinstance(body, Mapping) and isinstance(body.get("loads"), list) and body["loads"]:
            return read_loads(body["loads"])
        return (object(), 0) if await self._connection.is_healthy(url, timeout=LONGEST_LOOK_S) else None


def read_loads(loads: list[Any]) -> tuple[object, int]:
    """Convert an engine's loads, one per data-parallel rank, to the parts that show progress and its request count."""
    ranks = [rank for rank in loads if isinstance(rank, Mapping)]
    moves = [[rank.get(name) for name in MOVES] for rank in ranks]
    counts = [rank.get(name, 0) for rank in ranks for name in ("num_running_reqs", "num_waiting_reqs")]
    return moves, sum(count for count in counts if isinstance(count, int))
