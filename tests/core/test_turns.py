"""Turns: a burst of work leaves the event loop its turns, and nobody overtakes."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

from slime.core.turns import HOLD, Turns

WORKERS = 20


def most_at_once(*, in_turns: bool) -> tuple[int, list[int]]:
    """Return the most workers that ran between two turns of another task, and the order of all."""
    order: list[int] = []

    async def work(number: int, turns: Turns) -> None:
        if in_turns:
            await turns.take()
        order.append(number)
        time.sleep(HOLD)

    async def run() -> int:
        turns, seen = Turns(), [0]

        async def watch() -> None:
            while seen[-1] < WORKERS:
                await asyncio.sleep(0)
                seen.append(len(order))

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(work(number, turns) for number in range(WORKERS)))
        await watching
        return max(after - before for before, after in pairwise(seen))

    return asyncio.run(run()), order


def test_the_loop_runs_between_two_long_works() -> None:
    most, order = most_at_once(in_turns=True)
    assert most == 1 and order == list(range(WORKERS))
    assert most_at_once(in_turns=False)[0] == WORKERS, "control: the loop runs whatever is ready"


def test_a_cancelled_turn_is_passed_on() -> None:
    async def run() -> None:
        turns = Turns()
        waiting = [asyncio.create_task(turns.take()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        waiting[1].cancel()
        await waiting[2]

    asyncio.run(run())
