"""Turns: coroutines with work to do pass one after another, so that a burst of them does not block the event loop.

- Used by: `engine.client`, before it sends a request and before it reads a long answer.
- Invariant: between two coroutines that pass, others of the loop run at least every `HOLD` seconds.

An event loop runs everything that is ready before it looks at its sockets and timers again. If thousands of tasks begin
at once, or thousands of answers are there after a pause, that takes seconds, in which health checks and connections
time out.
"""

from __future__ import annotations

import asyncio
import time

HOLD = 0.02
"""Seconds for which coroutines may pass before the loop gets a turn; the work of one of them comes on top."""


class Turns:
    """The turns of one event loop."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._since = 0.0
        """When the loop had its last turn."""

    async def take(self) -> None:
        """Return when it is the caller's turn; callers pass in the order in which they came."""
        async with self._lock:
            if time.monotonic() - self._since > HOLD:
                await asyncio.sleep(0)
                self._since = time.monotonic()
