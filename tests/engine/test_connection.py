"""Requests while their event loop is blocked, and to a server that accepts no connection."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

import aiohttp
import pytest

from slime.engine import connection as module
from slime.engine.connection import Connection, EngineError

SERVER = """
import asyncio
from aiohttp import web

async def answer(request):
    await asyncio.sleep(0.3)
    return web.json_response({"path": request.path})

async def main():
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    print(site._server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
CONNECT_S = 0.3
NUM_REQUESTS = 200


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_S", CONNECT_S)
    monkeypatch.setattr(module, "TIMEOUTS", aiohttp.ClientTimeout(sock_connect=CONNECT_S))


@pytest.mark.parametrize("steps", [2, 4, 10])
def test_a_stop_of_the_loop_costs_no_request(server: str, steps: int) -> None:
    """The loop is blocked while requests connect, or while they wait for their answers."""

    async def ask() -> Counter[str]:
        connection = Connection(lambda url: None)

        async def one() -> str:
            try:
                return (await connection.request("GET", lambda: f"{server}/x", None, timeout=1))["path"]
            except EngineError as error:
                return str(error)

        async def stop() -> None:
            for _ in range(steps):
                await asyncio.sleep(0)
            time.sleep(CONNECT_S * 3)

        stopping = asyncio.create_task(stop()) if steps < 3 else None
        asking = [asyncio.create_task(one()) for _ in range(NUM_REQUESTS)]
        stopping = stopping or asyncio.create_task(stop())
        answers = Counter(await asyncio.gather(*asking))
        await stopping
        await connection.close()
        return answers

    assert asyncio.run(ask()) == {"/x": NUM_REQUESTS}


def test_a_health_check_survives_a_blocked_loop(server: str) -> None:
    async def ask() -> tuple[bool, bool]:
        connection = Connection(lambda url: None)
        asyncio.get_running_loop().call_later(0.1, time.sleep, 2)
        healthy = await connection.is_healthy(server, timeout=1)
        in_time = await connection.is_healthy(server, timeout=0.1)
        await connection.close()
        return healthy, in_time

    assert asyncio.run(ask()) == (True, False), "control: the limit holds while the loop runs"


def test_a_failed_connection_has_its_own_error() -> None:
    """A listener with a full queue accepts no further connection, and refuses none."""

    async def ask(url: str, patience: float) -> str:
        connection = Connection(lambda url: None)
        with pytest.raises(EngineError) as caught:
            await connection.request("GET", lambda: url, None, timeout=60, patience=patience)
        await connection.close()
        return str(caught.value)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        fill = [socket.socket() for _ in range(4)]
        for each in fill:
            each.setblocking(False)
            each.connect_ex(address)
        url = f"http://127.0.0.1:{address[1]}"
        error = asyncio.run(ask(url, patience=1))
        for each in fill:
            each.close()
    assert error == f"{url} did not answer: no connection within {CONNECT_S:g} s"


def test_a_missing_answer_has_its_own_error(server: str) -> None:
    async def ask() -> None:
        connection = Connection(lambda url: None)
        try:
            await connection.request("GET", lambda: f"{server}/x", None, timeout=0.1, patience=60)
        finally:
            await connection.close()

    with pytest.raises(EngineError, match=r"no answer within 0\.1 s"):
        asyncio.run(ask())
