"""An asyncio event loop on a virtual clock: where it would wait, its time jumps to the next timer.

- Used by: `loop`, for each simulated run.
- Invariant: nothing sleeps, and no thread or socket takes part, so the same coroutines give the same times every time.

Example: two tasks that sleep 3 s and 5 s end at 3.0 and 5.0 after a few microseconds of real time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Mapping
from typing import Any


class NothingLeft(RuntimeError):
    """The simulation waits, but no timer is set that could end the waiting."""


class _JumpingSelector(selectors.BaseSelector):
    """A selector that adds the timeout to its time instead of waiting for files."""

    def __init__(self) -> None:
        self.now = 0.0
        self._inner = selectors.SelectSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Jump over `timeout` seconds. Raises NothingLeft if it is None, which would mean to wait for ever."""
        if timeout is None:
            raise NothingLeft("the simulated run waits for something that never happens")
        self.now += max(timeout, 0.0)
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Register the loop's own wake-up pipe, which nothing writes to."""
        return self._inner.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._inner.unregister(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._inner.get_map()

    def close(self) -> None:
        self._inner.close()


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` begins at 0 and counts simulated seconds."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now
