"""Noticing that an engine or a router that runs without us has died; our own are the `fleet`'s.

Path: the rollout manager runs `first_death` beside every rollout and evaluation. Invariant: what died is named within
a few seconds; nothing waits for it for ever.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from slime.engine.client import EngineClient

POLL_S = 1.0
UNWELL_S = 5.0
"""Seconds without one good answer, after which what is not ours to watch counts as dead."""


@dataclass(frozen=True)
class Watched:
    """`name` says in errors what it is; `is_alive` is asked again and again."""

    name: str
    is_alive: Callable[[], Awaitable[bool]]


def answering(what: str, url: str, client: EngineClient) -> Watched:
    """What runs without us: alive as long as it answers."""
    unwell_since: float | None = None

    async def is_alive() -> bool:
        nonlocal unwell_since
        asked = time.monotonic()
        if await client.is_healthy(url):
            unwell_since = None
            return True
        unwell_since = unwell_since or asked
        return time.monotonic() - unwell_since < UNWELL_S

    return Watched(f"{what} {url}", is_alive)


class EngineWatch:
    """Polls all of `watched` at once."""

    def __init__(self, watched: Sequence[Watched]) -> None:
        self._watched = watched

    async def first_death(self) -> str:
        """Returns only once something has died: a sentence that names it."""
        while True:
            await asyncio.sleep(POLL_S)
            alive = await asyncio.gather(*(each.is_alive() for each in self._watched))
            for each, is_alive in zip(self._watched, alive, strict=True):
                if not is_alive:
                    return f"{each.name} died during generation"
