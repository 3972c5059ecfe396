"""Time in which the owner of a clock did not run does not count; all other time does."""

from __future__ import annotations

import asyncio
import time

import pytest

from slime.core.awake import AwakeClock, LoopClock, awake_timeout

STOP_S = 1.0


def test_a_stop_counts_as_two_intervals() -> None:
    clock = AwakeClock(0.05)
    begin = clock.time()
    time.sleep(0.3)
    assert clock.time() - begin == pytest.approx(0.1, abs=0.01), "even before the next tick"
    assert clock.tick() == pytest.approx(0.1, abs=0.01)
    for _ in range(4):
        time.sleep(0.03)
        clock.tick()
    assert clock.time() - begin >= 0.1 + 4 * 0.03 - 0.001, "control: shorter intervals count in full"


def test_a_limit_does_not_count_a_stop() -> None:
    async def answered_after_a_stop(limit: bool) -> bool:
        """Wait for an answer that comes during a stop longer than the limit."""
        answer = asyncio.Event()
        within = awake_timeout(STOP_S / 2) if limit else asyncio.timeout(STOP_S / 2)
        try:
            async with within:
                asyncio.get_running_loop().call_later(STOP_S / 4, time.sleep, STOP_S)
                asyncio.get_running_loop().call_later(STOP_S * 0.8, answer.set)
                await answer.wait()
        except TimeoutError:
            return False
        return True

    assert asyncio.run(answered_after_a_stop(True))
    assert not asyncio.run(answered_after_a_stop(False)), "control: an ordinary limit counts the stop"

    async def never() -> None:
        async with awake_timeout(0.2):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        asyncio.run(never())


def test_the_clock_runs_while_the_loop_waits() -> None:
    async def measure() -> tuple[float, float]:
        clock = LoopClock()
        begin = clock.time()
        await asyncio.sleep(1)
        waited = clock.time() - begin
        time.sleep(STOP_S)
        await asyncio.sleep(0)
        stopped = clock.time() - begin - waited
        clock.close()
        return waited, stopped

    waited, stopped = asyncio.run(measure())
    assert waited > 0.5, "a loaded machine may cost a part of the second"
    assert stopped < STOP_S, "an ordinary clock counts the whole stop"
