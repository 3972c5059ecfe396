"""A clock that stops while its owner does not run; limits on how long others may be silent are measured with it.

- Used by: limits on engines and requests, inside event loops.
- Invariant: time in which the owner could not hear an answer does not count.

A process may be stopped (SIGSTOP, a machine that slept), and an event loop may be busy with one long computation. In
that time it cannot hear answers. When it continues, an ordinary clock would report everybody else as silent for all
that time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

LOOP_TICK_S = 0.1


class AwakeClock:
    """Measures the seconds in which its owner was awake; the owner calls `tick` every `every` seconds.

    Between two ticks, at most twice that interval counts: with `every` 0.1, ticks at 0, 0.1 and 60.1 s count 0.1 + 0.2
    s.
    """

    def __init__(self, every: float) -> None:
        self._longest = 2 * every
        self._awake = 0.0
        self._ticked = time.monotonic()

    def tick(self) -> float:
        """Return the seconds since the last tick that count."""
        seconds, self._ticked = self._since_tick(), time.monotonic()
        self._awake += seconds
        return seconds

    def time(self) -> float:
        """Return a time in seconds; as with `time.monotonic`, only differences have a meaning."""
        return self._awake + self._since_tick()

    def _since_tick(self) -> float:
        return min(time.monotonic() - self._ticked, self._longest)


class LoopClock(AwakeClock):
    """An AwakeClock for the running event loop, which ticks automatically until it is closed."""

    def __init__(self) -> None:
        super().__init__(LOOP_TICK_S)
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(LOOP_TICK_S, self._again)

    def _again(self) -> None:
        self.tick()
        self._timer = self._loop.call_later(LOOP_TICK_S, self._again)

    def close(self) -> None:
        self._timer.cancel()

    @asynccontextmanager
    async def timeout(self, seconds: float) -> AsyncGenerator[None]:
        """Limit the block to `seconds` of this clock, as `asyncio.timeout` limits it to seconds of the ordinary clock.

        Raises:
            TimeoutError: the block took longer.
        """
        end = self.time() + seconds
        timer: asyncio.TimerHandle | None = None

        def look() -> None:
            nonlocal timer
            left = end - self.time()
            if left <= 0:
                limit.reschedule(self._loop.time())
            else:
                timer = self._loop.call_later(left, look)

        async with asyncio.timeout(None) as limit:
            look()
            try:
                yield
            finally:
                if timer is not None:
                    timer.cancel()


@asynccontextmanager
async def awake_timeout(seconds: float) -> AsyncGenerator[None]:
    """Limit the block to `seconds` in which the event loop runs.

    Raises:
        TimeoutError: the block took longer.
    """
    clock = LoopClock()
    try:
        async with clock.timeout(seconds):
            yield
    finally:
        clock.close()
