"""Presence: which engines are gone or hang while they take part in a broadcast of weights.

- Used by: `sync.in_flight` looks for engines that are gone while it broadcasts. After a broadcast that an engine's
  death has broken, the engine supervisor ends those that hang in it.
- Invariant: an engine that is only busy is neither gone nor hangs.

A request whose engine dies fails at once. An engine may also die after its answer: SGLang answers a bucket as soon as
its GPU has the work to do, so the broadcast itself may still be under way. NCCL does not notice that on one machine:
the other members wait in it until its own limit, half an hour in SGLang, and SGLang answers no request that needs its
GPU or the group meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from slime.engine.connection import Connection, EngineError
from slime.engine.protocol import DestroyWeightsUpdateGroup, Endpoint

LOOK_S = 1.0
"""Seconds between two looks for an engine that is gone."""
LEAVE_WITHIN_S = 15.0
"""Seconds in which an engine that is alive and does not hang leaves a weight group; it takes less than one."""


class Presence:
    """The presence of one client's engines."""

    def __init__(self, connection: Connection, find_engines: Callable[[], Awaitable[list[str]]]) -> None:
        """`find_engines` returns the URLs of the client's engines."""
        self._connection = connection
        self._find_engines = find_engines

    async def until_one_is_gone(self) -> None:
        """Wait until nothing listens at the address of one of the engines; it never returns otherwise.

        Raises:
            EngineError: naming that engine.
        """
        while True:
            await asyncio.sleep(LOOK_S)
            urls = await self._find_engines()
            for url, gone in zip(urls, await asyncio.gather(*map(self._connection.is_gone, urls)), strict=True):
                if gone:
                    raise EngineError(url, 0, "nothing listens there any more")

    async def hanging(self, *groups: str, within: float = LEAVE_WITHIN_S) -> list[str]:
        """Make all engines leave these weight groups; return the URLs of those that give no answer `within` seconds."""
        urls = await self._find_engines()

        async def leaves(url: str) -> bool:
            for group in groups:
                if not await self._leaves(url, group, within):
                    return False
            return True

        answers = await asyncio.gather(*map(leaves, urls))
        return [url for url, answered in zip(urls, answers, strict=True) if not answered]

    async def _leaves(self, url: str, group_name: str, within: float) -> bool:
        """Return False if the engine gives no answer; one that is gone, or knows no such group, does not hang."""
        body = DestroyWeightsUpdateGroup(group_name=group_name)
        try:
            async with self._connection.clock.timeout(within):
                await self._connection.request(
                    "POST",
                    lambda: url + Endpoint.DESTROY_WEIGHTS_UPDATE_GROUP,
                    body,
                    timeout=2 * within,  # out of reach: the limit of the block is shorter
                    collective=True,
                )
        except TimeoutError:
            return False
        except EngineError:
            return True
        return True
