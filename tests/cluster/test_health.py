"""What runs without us is watched by asking it: dead is what has not answered for a while, not what stumbles once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from slime.cluster import health
from slime.cluster.health import EngineWatch, answering
from slime.engine.client import EngineClient
from tests.cluster.runs import Task
from tests.sync.served import serving


def test_the_death_of_an_engine_that_is_not_ours_is_named(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "POLL_S", 0.05)
    monkeypatch.setattr(health, "UNWELL_S", 0.5)
    with serving(task.model, tmp_path, engines=2, router=False) as engines:
        urls = [engine.url for engine in engines]

        async def watch() -> str:
            async with EngineClient("", engines=urls) as client:
                death = asyncio.create_task(
                    EngineWatch([answering("the engine", url, client) for url in urls]).first_death()
                )
                await asyncio.sleep(1)
                assert not death.done()
                await asyncio.to_thread(engines[1].stop)
                return await asyncio.wait_for(death, 10)

        assert asyncio.run(watch()) == f"the engine {urls[1]} died during generation"
