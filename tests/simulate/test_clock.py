"""The virtual clock: time jumps, and waiting for nothing is an error instead of a hang."""

from __future__ import annotations

import asyncio

import pytest

from slime.simulate.clock import NothingLeft, VirtualLoop


def test_time_jumps_to_the_next_timer() -> None:
    loop = VirtualLoop()
    ends: list[float] = []

    async def sleeper(seconds: float) -> None:
        await asyncio.sleep(seconds)
        ends.append(loop.time())

    async def both() -> None:
        await asyncio.gather(sleeper(86400.0), sleeper(3.0))

    loop.run_until_complete(both())
    loop.close()
    assert ends == pytest.approx([3.0, 86400.0])


def test_waiting_for_nothing_is_an_error() -> None:
    loop = VirtualLoop()
    with pytest.raises(NothingLeft):
        loop.run_until_complete(asyncio.wait_for(loop.create_future(), None))
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
