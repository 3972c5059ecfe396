"""Work of the rollout manager that a stop ends early, and work that is done before the stop."""

from __future__ import annotations

import asyncio

import pytest

from slime.cluster.manager.abortable import Abortable
from slime.core.errors import RunError


def test_aborted_work_is_an_error() -> None:
    async def main() -> list[str]:
        seen: list[str] = []

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        abortable = Abortable()
        running = asyncio.ensure_future(abortable.run(work))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await abortable.abort()
        for each in (running, abortable.run(work)):  # the second begins too late
            with pytest.raises(RunError, match="aborted"):
                await each
        return seen

    assert asyncio.run(main()) == ["cancelled"]


def test_finished_work_is_not_aborted() -> None:
    async def main() -> int:
        async def work() -> int:
            return 7

        abortable = Abortable()
        running = asyncio.ensure_future(abortable.run(work))
        for _ in range(2):  # the work is done, and nobody has taken its result
            await asyncio.sleep(0)
        await abortable.abort()
        return await running

    assert asyncio.run(main()) == 7
