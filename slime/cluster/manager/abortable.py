"""Abortable: work of the rollout manager, a rollout or an evaluation, that a stop of the run may end early.

- Used by: `DataSide` has one for rollouts and one for evaluations.
- Invariant: after `abort`, the work has either come to its own end or been cancelled, and no other begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from slime.core.errors import RunError

T = TypeVar("T")


class Abortable:
    """Runs one piece of work at a time."""

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None
        self._aborted = False

    async def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Return the result of `work()`.

        Raises:
            RunError: `abort` was called.
        """
        if self._aborted:
            raise RunError("aborted, because the run ends")
        self._task = task = asyncio.ensure_future(work())
        try:
            return await task
        except asyncio.CancelledError:
            if self._aborted:
                raise RunError("aborted, because the run ends") from None
            raise

    async def abort(self) -> None:
        """End the work that runs, and let no more begin."""
        self._aborted = True
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})
