"""Weight-update sessions: from version 0.5.21 on, SGLang takes weights only between a session's begin and end.

- Called by: `sync.transport` opens one for each sync through `EngineClient.update_sessions`.
- Invariant: an engine is asked once whether it has sessions, when weights are first sent to it. Its version number is
  never used for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from slime.engine.connection import Connection, EngineError
from slime.engine.message import Message
from slime.engine.protocol import Endpoint

TIMEOUT = 600.0
"""Seconds for one request; an engine prepares its weights when a session ends."""
T = TypeVar("T")


class UpdateSessions:
    """The sessions at one client's engines. Engines without sessions are left alone."""

    def __init__(self, connection: Connection, find_engines: Callable[[], Awaitable[list[str]]]) -> None:
        """`find_engines` returns the URLs of the client's engines."""
        self._connection = connection
        self._find_engines = find_engines
        self._engines: Sequence[str] | None = None
        """URLs of engines that have sessions; None if that is not known, or a session may have been left open."""

    async def begin(self) -> None:
        """Open a session at every engine that has sessions.

        Raises:
            EngineError: an engine did not open a session; others may have, and `end_left_open` closes theirs.
        """
        await self._all(Endpoint.BEGIN_WEIGHT_UPDATE, await self.engines())

    async def end(self) -> None:
        """Close the sessions that `begin` has opened.

        Raises:
            EngineError: an engine did not close its session, so its weights are not ready for use.
        """
        await self._all(Endpoint.END_WEIGHT_UPDATE, await self.engines())

    async def engines(self) -> Sequence[str]:
        """Return the URLs of engines that have sessions; the first call also ends what a killed run left open."""
        if self._engines is None:
            await self.end_left_open()
        return self._engines or ()

    async def end_left_open(self) -> None:
        """End the session that a killed run or a failed sync may have left open at an engine.

        Raises:
            EngineError: an engine did not answer as expected; the others were asked nevertheless.
        """
        self._engines = None
        urls = await self._find_engines()
        found = await asyncio.gather(*map(self._end_left_open, urls), return_exceptions=True)
        self._engines = [url for url, has_sessions in zip(urls, _all_or_raise(found), strict=True) if has_sessions]

    async def _end_left_open(self, url: str) -> bool:
        """Return whether the engine has sessions: it answers 404 if not, and 400 if it has but none is open."""
        try:
            await self._ask(url, Endpoint.END_WEIGHT_UPDATE, collective=False)
        except EngineError as error:
            if error.status not in (400, 404):
                raise
            return error.status == 400
        return True

    async def _all(self, endpoint: Endpoint, urls: Sequence[str]) -> None:
        """Wait for all answers, so that no engine gets its next request while it still works on this one."""
        asking = [self._ask(url, endpoint, collective=True) for url in urls]
        _all_or_raise(await asyncio.gather(*asking, return_exceptions=True))

    async def _ask(self, url: str, endpoint: Endpoint, *, collective: bool) -> object:
        """Send one request; a `collective` one that may have arrived is not repeated, as that would be an error."""
        return await self._connection.request(
            "POST", lambda: url + endpoint, Message(), timeout=TIMEOUT, collective=collective
        )


def _all_or_raise(found: Sequence[T | BaseException]) -> list[T]:
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return [each for each in found if not isinstance(each, BaseException)]
