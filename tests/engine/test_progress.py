"""A generation is given up only if nothing progresses, not for its length or its place in a queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tiny_models import StartEngine

from slime.config.args import Args
from slime.engine.client import EngineClient, EngineError
from slime.engine.connection import Connection
from slime.engine.launch import launch_router
from slime.engine.membership import register_worker
from slime.engine.message import Message
from slime.engine.progress import Progress, read_loads
from slime.engine.protocol import GenerateRequest, PauseGeneration, SamplingParams
from slime.engine.server_process import find_free_port

LIMIT_S = 0.8
REQUEST = GenerateRequest(input_ids=[1, 2, 3], sampling_params=SamplingParams(max_new_tokens=4))
ANSWER = {
    "text": "",
    "output_ids": [7],
    "meta_info": {
        "finish_reason": {"type": "length"},
        "weight_version": "1",
        "prompt_tokens": 3,
        "completion_tokens": 1,
        "output_token_logprobs": [[-0.5, 7, None]],
    },
}
# As SGLang 0.5.21 answers /v1/loads?include=core, and what is constant in it for an idle or a stuck scheduler.
LOAD = {"timestamp": 1.0, "dp_rank": 0, "num_waiting_reqs": 0, "cache_hit_rate": 0.1, "max_total_num_tokens": 9999}


@dataclass
class TimedEngine:
    """Answers each generation after `seconds`; it progresses until `stuck_after`, or reports no loads at all."""

    seconds: float
    stuck_after: float = float("inf")
    reports: bool = True
    url: str = ""
    running: int = 0
    begin: float = 0.0

    async def generate(self, request: web.Request) -> web.Response:
        self.running += 1
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        return web.json_response(ANSWER)

    async def loads(self, request: web.Request) -> web.Response:
        if not self.reports:
            raise web.HTTPNotFound
        tokens = 100 * min(time.monotonic() - self.begin, self.stuck_after) if self.running else 0
        load = {**LOAD, "timestamp": time.time(), "num_running_reqs": self.running, "num_used_tokens": int(tokens)}
        return web.json_response({"version": "0.5.21", "loads": [load]})

    async def other(self, request: web.Request) -> web.Response:
        return web.json_response({"model_path": "m", "tp_size": 1})


@asynccontextmanager
async def served(*engines: TimedEngine) -> AsyncIterator[None]:
    runners: list[web.AppRunner] = []
    for engine in engines:
        app = web.Application()
        app.router.add_post("/generate", engine.generate)
        app.router.add_get("/v1/loads", engine.loads)
        app.router.add_route("*", "/{path:.*}", engine.other)
        runners.append(runner := web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True))
        await runner.setup()
        port = find_free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        engine.url, engine.begin = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        yield
    finally:
        for runner in runners:
            await runner.cleanup()


async def outcome(client: EngineClient) -> str:
    try:
        return (await client.generate(REQUEST)).finish_reason
    except EngineError as error:
        return str(error)


def ask(*engines: TimedEngine, hold: float = 0.0, stop: float = 0.0) -> str:
    """Return the result of one generation at the first engine. `hold`: seconds in which weights change, from the start;
    `stop`: seconds for which the event loop of the client is blocked."""

    async def run() -> str:
        async with (
            served(*engines),
            EngineClient(engines[0].url, engines=[e.url for e in engines], request_timeout=LIMIT_S) as client,
        ):
            loop = asyncio.get_running_loop()
            if hold:
                client.progress.hold(True)
                loop.call_later(hold, client.progress.hold, False)
            if stop:
                loop.call_later(0.1, time.sleep, stop)
            return await outcome(client)

    return asyncio.run(run())


GIVEN_UP = "no engine has made progress for 0.8 s (--engine-request-timeout); requests that the engines report: "


def test_a_long_response_continues_while_tokens_come() -> None:
    assert ask(TimedEngine(seconds=LIMIT_S * 4)) == "length"
    stuck = ask(TimedEngine(seconds=60, stuck_after=LIMIT_S))
    assert GIVEN_UP in stuck and stuck.endswith("has 1"), "control"


def test_a_request_waits_while_any_engine_progresses() -> None:
    """It is not known which engine the router has sent it to: it may wait in a queue."""
    waiting, busy = TimedEngine(seconds=LIMIT_S * 3, stuck_after=0), TimedEngine(seconds=60)
    busy.running = 1
    assert ask(waiting, busy) == "length"
    lost, idle = TimedEngine(seconds=60, stuck_after=0), TimedEngine(seconds=60)
    assert GIVEN_UP in ask(lost, idle), "control"


def test_weight_syncs_and_blocked_loops_do_not_count() -> None:
    paused = TimedEngine(seconds=LIMIT_S * 3, stuck_after=0)
    assert ask(paused, hold=LIMIT_S * 2.5) == "length"
    assert ask(TimedEngine(seconds=LIMIT_S * 2, stuck_after=0), stop=LIMIT_S * 2) == "length"
    assert GIVEN_UP in ask(TimedEngine(seconds=60, stuck_after=0), hold=LIMIT_S), "control: what is left counts"


def test_a_healthy_engine_without_loads_counts_moving() -> None:
    assert ask(TimedEngine(seconds=LIMIT_S * 3, reports=False)) == "length"


def test_a_router_cuts_no_response_off(tmp_path: Path) -> None:
    """sglang-router limits whole responses: ours starts without that limit, whatever the time without progress is."""
    args = Args(num_rollout=1, engine_request_timeout=1.0)
    router = launch_router(args, host="127.0.0.1", port=find_free_port(), log_path=tmp_path / "router.log")

    async def run(engine: TimedEngine) -> str:
        async with served(engine):
            await asyncio.to_thread(router.wait_ready, 60)
            await asyncio.to_thread(register_worker, router.url, engine.url)
            async with EngineClient(router.url, engines=[engine.url], request_timeout=1.0) as client:
                return await outcome(client)

    try:
        assert asyncio.run(run(TimedEngine(seconds=3))) == "length"
    finally:
        router.stop()


def test_only_the_stuck_engine_is_named() -> None:
    """The supervisor restarts an engine that has requests and makes no tokens."""

    async def run() -> list[str | None]:
        stuck, busy, idle = TimedEngine(60, stuck_after=0), TimedEngine(60), TimedEngine(60)
        busy.running = 1
        engines = [stuck, busy, idle]
        async with (
            served(*engines),
            EngineClient(stuck.url, engines=[e.url for e in engines], request_timeout=LIMIT_S) as client,
        ):
            asking = asyncio.create_task(outcome(client))
            await asyncio.sleep(LIMIT_S * 2.5)
            troubles = [client.progress.trouble(engine.url) for engine in engines]
            asking.cancel()
            await asyncio.wait([asking])
            return troubles

    wrong = "has made no progress with 1 requests for 0.8 s (--engine-request-timeout)"
    assert asyncio.run(run()) == [wrong, None, None]


def test_the_embedded_engines_load_moves_with_its_tokens(
    model_dirs: dict[str, Path], start_engine: StartEngine
) -> None:
    engine = start_engine(model_dirs["glm4"], "--api-key", "K")

    async def run() -> tuple[list[bool], list[int], dict[str, Any]]:
        connection = Connection(lambda url: "K")

        async def urls() -> list[str]:
            return [engine.url]

        async def load() -> dict[str, Any]:
            answer = await connection.ask_once(f"{engine.url}/v1/loads", timeout=10)
            assert answer is not None and answer[0] == 200
            return answer[1]

        async def post(path: str, body: Any) -> None:
            await connection.request("POST", lambda: engine.url + path, body, timeout=60)

        progress = Progress(connection, urls, limit=60)
        long = GenerateRequest(input_ids=[1], sampling_params=SamplingParams(max_new_tokens=500, ignore_eos=True))
        idle = [await progress.look(), await progress.look()]
        asking = asyncio.create_task(post("/generate", long))
        while not read_loads((await load())["loads"])[1]:
            await asyncio.sleep(0.01)
        await progress.look()
        await asyncio.sleep(0.05)
        moving = [await progress.look()]
        await post("/pause_generation", PauseGeneration(mode="in_place"))
        await progress.look()
        await asyncio.sleep(0.05)
        paused, in_flight = [await progress.look()], [read_loads((await load())["loads"])[1]]
        await post("/continue_generation", Message())
        await asking
        loads = await load()
        await connection.close()
        return [*idle, *moving, *paused], in_flight, loads

    moved, in_flight, loads = asyncio.run(run())
    assert moved == [False, False, True, False]
    assert in_flight == [1], "a paused engine has its requests"
    assert loads["loads"][0].items() >= {"dp_rank": 0, "num_running_reqs": 0, "num_waiting_reqs": 0}.items()


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([{**LOAD, "num_running_reqs": 2, "num_waiting_reqs": 3}], 5),
        ([{**LOAD, "num_running_reqs": 2}, {**LOAD, "dp_rank": 1, "num_running_reqs": 1}], 3),
        ([], 0),
        ([None, 7, {"num_running_reqs": "many"}], 0),
    ],
)
def test_requests_of_all_ranks_are_counted(loads: list[Any], expected: int) -> None:
    assert read_loads(loads)[1] == expected
