"""External engines: their health is checked, and so are their weights whenever they have generated."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slime.cluster.engines import engine_health
from slime.cluster.engines.engine_health import RESTARTS_WITHIN_S, EngineWatch, RestartLimit, answering, first_trouble
from slime.cluster.rollout_manager import RolloutManager
from slime.config.args import Args
from slime.engine.client import EngineClient, EngineError
from slime.engine.membership import Membership
from slime.engine.server_process import ManagedProcess
from tests.cluster.runs import Task
from tests.engine.recording_engine import recording_engine
from tests.sync.served import serving

LIMIT_S = 1.0
HEALTH_SERVER = """
import asyncio
from aiohttp import web

async def health(request):
    await asyncio.sleep(0.3)
    return web.Response()

async def main():
    app = web.Application()
    app.router.add_get("/health", health)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(site._server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
"""An engine that answers health checks slowly, as SGLang does, so that checks are in flight at any moment."""


@pytest.fixture(scope="module")
def served(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ManagedProcess]]:
    with serving(task.model, tmp_path_factory.mktemp("logs"), engines=2) as processes:
        yield processes


def test_a_restarted_engine_is_noticed(task: Task, served: list[ManagedProcess], tmp_path: Path) -> None:
    """It is healthy and registered with the router, but it generates with another policy."""
    *engines, router = served
    urls = [engine.url for engine in engines]
    hook = "tests.cluster.hooks_for_tests.evaluate"
    args = Args(hf_checkpoint=str(task.model), rollout_external_engines=tuple(urls), eval_function_path=hook)
    manager = RolloutManager(args, str(tmp_path / "logs"))
    manager.start()

    async def evaluate() -> None:
        await manager.connect_engines(router.url, urls, [])
        await manager.set_policy_version(1)
        async with EngineClient(router.url, engines=urls) as client:
            await client.update_weights_from_disk(str(task.model), "1")
        assert await manager.evaluate(0)
        async with EngineClient(router.url, engines=urls[1:]) as client:
            await client.update_weights_from_disk(str(task.model), "0")
        try:
            with pytest.raises(RuntimeError, match=f"have lost policy version 1 .*: {urls[1]} reports 0;"):
                await manager.evaluate(0)
        finally:
            await manager.close()

    asyncio.run(evaluate())


def test_a_strangers_engine_at_the_router_is_noticed(
    task: Task, served: list[ManagedProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An external router may accept engines from anybody, at any time."""
    *engines, router = served
    urls = [engine.url for engine in engines]
    monkeypatch.setenv("STRANGER", "")
    monkeypatch.setenv("ROUTER", router.url)
    hook = "tests.cluster.hooks_for_tests.let_a_stranger_in"
    flags = {"rollout_external_engines": tuple(urls), "eval_function_path": hook, "debug_rollout_only": True}
    manager = RolloutManager(Args(hf_checkpoint=str(task.model), **flags), str(tmp_path / "logs"))
    manager.start()

    async def evaluate(stranger: str) -> None:
        await manager.connect_engines(router.url, urls, [])
        assert await manager.evaluate(0)
        monkeypatch.setenv("STRANGER", stranger)
        try:
            for _ in ("it came during the evaluation", "it was there before"):
                with pytest.raises(EngineError, match=f"engines that are not this run's: {stranger}"):
                    await manager.evaluate(0)
        finally:
            await manager.close()

    with recording_engine() as stranger:
        asyncio.run(evaluate(stranger.url))
        assert stranger.generations() == []
        Membership(router.url).remove(stranger.url)


def test_a_blocked_loop_is_no_engines_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty engines are watched while the manager's loop is blocked for longer than their limit; then one hangs."""
    monkeypatch.setattr(engine_health, "POLL_S", 0.1)
    monkeypatch.setattr(engine_health, "UNWELL_S", LIMIT_S)
    monkeypatch.setattr(engine_health, "HEALTH_CHECK_S", LIMIT_S)

    async def is_there() -> bool:
        return True

    async def watch(process: subprocess.Popen[str], url: str) -> list[str]:
        async with EngineClient(url, engines=[url]) as client:
            watching = [asyncio.create_task(first_trouble(is_there, url, client, limit=LIMIT_S)) for _ in range(20)]
            others = [answering("the engine", url, client) for _ in range(20)]
            watching += [asyncio.create_task(EngineWatch([each]).first_death()) for each in others]
            for _ in range(2):
                await asyncio.sleep(0.25)  # checks are in flight
                time.sleep(LIMIT_S * 1.3)
            await asyncio.sleep(LIMIT_S / 2)
            assert not any(task.done() for task in watching)
            process.send_signal(signal.SIGSTOP)
            return await asyncio.wait_for(asyncio.gather(*watching), 30)

    process = subprocess.Popen([sys.executable, "-c", HEALTH_SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        reported = asyncio.run(watch(process, url))
    finally:
        process.kill()
        process.wait()
    hung = "has answered no health check for 1 s (--engine-health-timeout)"
    assert reported == [hung] * 20 + [f"the engine {url} died during generation"] * 20, "control: a hang is noticed"


def test_restarts_are_counted_within_an_hour() -> None:
    limit = RestartLimit(2)
    assert all(limit.allow(f"engine {index}", now=0.0) for index in range(100)), "each engine has its own count"
    assert limit.allow("engine 0", now=10.0)
    assert not limit.allow("engine 0", now=RESTARTS_WITHIN_S - 1)
    assert limit.allow("engine 1", now=RESTARTS_WITHIN_S - 1)
    assert limit.allow("engine 0", now=RESTARTS_WITHIN_S + 1), "an hour after the first"
    assert not limit.allow("engine 0", now=RESTARTS_WITHIN_S + 2), "the one at 10 s still counts"
    assert not RestartLimit(0).allow("engine 0", now=0.0)


def test_the_death_of_an_external_engine_is_named(
    served: list[ManagedProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is the last test, because it ends an engine."""
    monkeypatch.setattr(engine_health, "POLL_S", 0.05)
    monkeypatch.setattr(engine_health, "UNWELL_S", 0.5)
    urls = [engine.url for engine in served[:-1]]

    async def watch() -> str:
        async with EngineClient("", engines=urls) as client:
            watched = [answering("the engine", url, client) for url in urls]
            death = asyncio.create_task(EngineWatch(watched).first_death())
            await asyncio.sleep(1)
            assert not death.done()
            await asyncio.to_thread(served[1].stop)
            return await asyncio.wait_for(death, 10)

    assert asyncio.run(watch()) == f"the engine {urls[1]} died during generation"
