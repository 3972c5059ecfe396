"""One HTTP request to an engine or the router, with the retries that can help.

Path: `client` speaks the protocol through here. Invariant: what failed is raised as an EngineError that names URL and
status, after the retries that can help (no connection, 502, 503, a router's lost connection), and never swallowed.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import aiohttp
import orjson

from slime.core.awake import LoopClock
from slime.engine.message import Message
from slime.engine.protocol import Endpoint

RETRY_STATUS = (502, 503)
LOST_ENGINE = "error sending request for url"
"""Where sglang-router loses its connection to an engine, it answers 500 with these words of its HTTP client."""
RETRIES = 6
BACKOFF = 0.2
"""Seconds before the first retry; each further one waits twice as long."""
CONNECT_S = 10.0
"""Seconds within which a TCP connection has to be there."""
LONGEST_BACKOFF = 2.0
"""Seconds between two attempts of a request that has patience."""
TIMEOUTS = aiohttp.ClientTimeout(sock_connect=CONNECT_S)
"""aiohttp's own timeouts also count time in which the event loop stands still: this one may come by mistake."""
_CONTENT = {"Content-Type": "application/json"}


class EngineError(RuntimeError):
    """A request that an engine or the router did not answer as asked. `status` 0: no answer at all."""

    def __init__(self, url: str, status: int, message: str) -> None:
        super().__init__(url, status, message)
        self.url, self.status, self.message = url, status, message

    @property
    def may_pass(self) -> bool:
        """Whether another attempt may be answered: there was no engine at hand, or the one that was chosen is gone."""
        return self.status in (0, *RETRY_STATUS) or (self.status == 500 and LOST_ENGINE in self.message)

    def __str__(self) -> str:
        return f"{self.url} {f'answered {self.status}' if self.status else 'did not answer'}: {self.message}"


class Limit(Protocol):
    """How long one attempt of a request may take."""

    def attempt(self) -> AbstractAsyncContextManager[None]:
        """Around the attempt; raises TimeoutError once it has taken too long."""
        ...

    def passed(self) -> str:
        """What to say of an attempt that has taken too long."""
        ...


class Connection:
    """The connections of one event loop, shared by all requests."""

    def __init__(self, key_for: Callable[[str], str | None]) -> None:
        """`key_for`: the API key that belongs to a URL; None: it is sent none."""
        self._key_for = key_for
        self._opened: aiohttp.ClientSession | None = None
        self._clock: LoopClock | None = None

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()
            self._opened = None
        if self._clock is not None:
            self._clock.close()
            self._clock = None

    @property
    def clock(self) -> LoopClock:
        """A clock that stands still while the event loop of these connections does."""
        if self._clock is None:
            self._clock = LoopClock()
        return self._clock

    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None or self._opened.closed:
            # aiohttp would hold back everything beyond 100 connections; the caller decides what is in flight.
            # Idle connections are dropped before SGLang drops them (after 5 s), or a request would meet a closed one.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)
            # Engines are ours: a proxy of the environment has no business between.
            self._opened = aiohttp.ClientSession(connector=connector, headers=_CONTENT, trust_env=False)
        return self._opened

    async def request(
        self,
        method: str,
        find_url: Callable[[], str | None],
        body: Message | None,
        *,
        timeout: float | Limit,
        collective: bool = False,
        patience: float = 0.0,
        before_retry: Callable[[float], Awaitable[None]] | None = None,
    ) -> Any:
        """The decoded answer. Retries where there was no connection, or the router had no engine at hand.

        `timeout`: of one attempt, in seconds in which the event loop runs, or another limit. `find_url`: asked before
        each attempt; None: whoever was asked is not there any more, and the error of the last attempt stands.
        `collective`: the engine takes part in something with others, once; it is asked again only if the first request
        cannot have reached it. `patience`: seconds of waiting for a connection, and between attempts, at least.
        `before_retry`: called with the seconds waited so far; an EngineError that it raises ends the attempts.
        """
        data = None if body is None else orjson.dumps(body.to_json())
        limit = _Seconds(self.clock, timeout) if isinstance(timeout, int | float) else timeout
        problem = EngineError("an engine", 0, "it is not part of the run any more")
        waited = 0.0
        for retry in itertools.count():
            wait = _wait(retry - 1, waited, patience) if retry else 0.0
            if wait is None:
                break
            await asyncio.sleep(wait)
            waited += wait
            if wait and before_retry is not None:
                await before_retry(waited)
            url = find_url()
            if url is None:
                break
            begin = self.clock.time()
            try:
                async with (
                    limit.attempt(),
                    self._session().request(
                        method, url, data=data, timeout=TIMEOUTS, headers=authorization(self._key_for(url))
                    ) as answer,
                ):
                    raw = await answer.read()
            except aiohttp.ConnectionTimeoutError:  # which is a TimeoutError as well
                # Nothing was sent. It may be this process that did not get to it, busy with something else for long.
                problem = EngineError(url, 0, f"no connection within {CONNECT_S:g} s")
                waited += self.clock.time() - begin
                continue
            except TimeoutError:
                raise EngineError(url, 0, limit.passed()) from None
            except (aiohttp.ClientError, OSError) as error:
                problem = EngineError(url, 0, f"{type(error).__name__}: {error}")
                if collective and not isinstance(error, aiohttp.ClientConnectorError):
                    break
                continue
            if answer.status == 200:
                return _decode(url, raw)
            problem = EngineError(url, answer.status, _message(raw))
            if collective or not problem.may_pass:
                break
        raise problem

    async def ask_once(self, url: str, timeout: float) -> tuple[int, Any] | None:
        """GET -> status and decoded answer (None where it is no JSON); None: there is no answer in time."""
        try:
            async with (
                self.clock.timeout(timeout),
                self._session().get(
                    url, timeout=aiohttp.ClientTimeout(), headers=authorization(self._key_for(url))
                ) as answer,
            ):
                raw = await answer.read()
        except (TimeoutError, aiohttp.ClientError, OSError):
            return None
        try:
            return answer.status, orjson.loads(raw)
        except orjson.JSONDecodeError:
            return answer.status, None

    async def is_healthy(self, url: str, timeout: float) -> bool:
        """Whether the engine or router at `url` is well; asked once."""
        try:
            async with (
                self.clock.timeout(timeout),
                self._session().get(url + Endpoint.HEALTH, timeout=aiohttp.ClientTimeout()) as answer,
            ):
                return answer.status == 200
        except (TimeoutError, aiohttp.ClientError, OSError):
            return False


def authorization(key: str | None) -> dict[str, str]:
    """The header that carries `key`; none without one."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


class _Seconds:
    """A Limit: so many seconds in which the event loop runs."""

    def __init__(self, clock: LoopClock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds

    def attempt(self) -> AbstractAsyncContextManager[None]:
        return self._clock.timeout(self._seconds)

    def passed(self) -> str:
        return f"no answer within {self._seconds:g} s"


def _wait(retry: int, waited: float, patience: float) -> float | None:
    """Seconds before retry number `retry`, after `waited` seconds; None: there is none any more."""
    if not patience:
        return BACKOFF * 2**retry if retry < RETRIES else None
    return min(BACKOFF * 2 ** min(retry, RETRIES), LONGEST_BACKOFF) if waited < patience else None


def _decode(url: str, raw: bytes) -> Any:
    if not raw.startswith((b"{", b"[")):  # SGLang answers some requests in words
        return {"message": raw.decode(errors="replace")}
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise EngineError(url, 200, f"the answer is no JSON: {error}") from error


def _message(raw: bytes) -> str:
    """The engine's own words out of an error body."""
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return raw.decode(errors="replace")[:500]
    if isinstance(data, Mapping):
        error = data.get("error")
        inner = error.get("message") if isinstance(error, Mapping) else error
        return str(inner or data.get("message") or data)[:2000]
    return str(data)[:2000]
