"""Run an async reward function in one process, with many tasks in flight in one event loop.

- Called by: `worker`. A task that waits too long is cancelled here. A task whose own code blocks the loop is left to
  the owner, which sees on the page that nothing moves, and which task is at fault.
- Invariant: time in which a task's code holds the loop does not count against other tasks.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
import types
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any

from slime.rollout.reward_pool.channel import HEADER, Page, pack

TICK = 0.05
"""Seconds between two checks of the time limits."""


@dataclass
class _Times:
    """The time that a task has used, as `_stepped` measures it."""

    started: float | None = None
    """The start on the loop's clock of free time; None until the task's code has run for the first time."""
    held: float = 0.0
    """Seconds for which the task's own code held the loop, beyond what that clock counts."""


@dataclass(frozen=True)
class _Job:
    task: asyncio.Task[None]
    times: _Times


async def serve_together(
    connection: socket.socket,
    page: Page,
    judge: Callable[[bytes], Coroutine[Any, Any, bytes]],
    late: bytes,
    limit: float,
) -> None:
    """Serve until the owner closes the connection, with all tasks in this event loop; then end the process.

    Each task that takes longer than `limit` seconds is cancelled. `judge` makes the answer from a task's payload;
    `late` is the answer of a task that is cancelled.
    """
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    await _Together(writer, page, judge, late, limit).serve(reader)


class _Together:
    """The tasks in flight, and the connection that their answers go to."""

    def __init__(
        self,
        writer: asyncio.StreamWriter,
        page: Page,
        judge: Callable[[bytes], Coroutine[Any, Any, bytes]],
        late: bytes,
        limit: float,
    ) -> None:
        self._writer, self._page, self._judge, self._late, self._limit = writer, page, judge, late, limit
        self._jobs: dict[int, _Job] = {}
        self._clock = 0.0
        """Seconds in which the loop was free: one check adds at most two ticks, however long the loop was blocked."""

    async def serve(self, reader: asyncio.StreamReader) -> None:
        """Serve until the owner closes the connection; then end the process, whatever its tasks would do."""
        watch = asyncio.create_task(self._watch())  # the name keeps it from being garbage-collected
        try:
            while True:
                number, length = HEADER.unpack(await reader.readexactly(HEADER.size))
                payload = await reader.readexactly(length)
                if payload:
                    times = _Times()
                    self._jobs[number] = _Job(asyncio.create_task(self._run(number, times, payload)), times)
                elif number in self._jobs:
                    self._end(number, self._late)
        except asyncio.IncompleteReadError:
            watch.cancel()
            os._exit(0)

    async def _run(self, number: int, times: _Times, payload: bytes) -> None:
        answer = await self._stepped(number, times, self._judge(payload))
        if self._jobs.pop(number, None) is not None:
            self._writer.write(pack(number, answer))

    def _end(self, number: int, answer: bytes) -> None:
        """Answer now, whatever the task does when it is cancelled."""
        self._jobs.pop(number).task.cancel()
        self._writer.write(pack(number, answer))

    async def _watch(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(TICK)
            self._page.leave()
            now = time.monotonic()
            self._clock += min(now - last, 2 * TICK)
            last = now
            for number, job in list(self._jobs.items()):
                started = job.times.started
                if started is not None and self._clock - started + job.times.held > self._limit:
                    self._end(number, self._late)

    @types.coroutine
    def _stepped(self, number: int, times: _Times, coroutine: Coroutine[Any, Any, bytes]) -> Generator[Any, Any, bytes]:
        """Await `coroutine`, and show on the page when its code runs."""
        times.started = self._clock
        thrown: BaseException | None = None
        while True:
            start = time.monotonic()
            self._page.enter(number)
            try:
                waited_for = coroutine.send(None) if thrown is None else coroutine.throw(thrown)
            except StopIteration as end:
                self._page.leave()
                return end.value
            except (Exception, asyncio.CancelledError):
                self._page.leave()
                raise
            except BaseException:  # noqa: BLE001 (SystemExit is a crash; end before another task could be blamed)
                os._exit(1)
            self._page.leave()
            times.held += max(0.0, time.monotonic() - start - TICK)
            thrown = None
            try:
                yield waited_for
            except BaseException as error:  # noqa: BLE001 (the loop cancels the task, so its code has to get this)
                thrown = error
