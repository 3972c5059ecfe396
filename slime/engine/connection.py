"""Send one HTTP request to an engine or the router, with retries for failures that may pass.

- Called by: `client` sends all its requests through here.
- Invariant: a failure is raised as an EngineError that names URL and status, after the retries that can help (no
  connection, 502, 503, a connection that the router lost). No failure is swallowed.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol
from urllib.parse import urlsplit

import aiohttp
import orjson

from slime.core.awake import LoopClock
from slime.engine.message import Message
from slime.engine.protocol import Endpoint

RETRY_STATUS = (502, 503)
LOST_ENGINE = "error sending request for url"
"""The text in sglang-router's 500 answer when it loses its connection to an engine; it comes from its HTTP client."""
RETRIES = 6
BACKOFF = 0.2
"""Seconds before the first retry; each further retry waits twice as long."""
CONNECT_S = 10.0
"""Seconds within which a TCP connection has to open."""
LONGEST_BACKOFF = 2.0
"""The most seconds between two attempts of a request that has patience."""
TIMEOUTS = aiohttp.ClientTimeout(sock_connect=CONNECT_S)
"""Connection timeout only: aiohttp's own timeouts also count time in which the event loop is blocked."""
GONE = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ETIMEDOUT)
"""Errors of a connection to a process that has ended, or whose machine has."""
_CONTENT = {"Content-Type": "application/json"}


class EngineError(RuntimeError):
    """A request that an engine or the router did not answer as expected. `status` 0 means no answer at all."""

    def __init__(self, url: str, status: int, message: str) -> None:
        super().__init__(url, status, message)
        self.url, self.status, self.message = url, status, message

    @property
    def may_pass(self) -> bool:
        """Whether another attempt may succeed: no engine was available, or the chosen one is gone."""
        return self.status in (0, *RETRY_STATUS) or (self.status == 500 and LOST_ENGINE in self.message)

    def __str__(self) -> str:
        return f"{self.url} {f'answered {self.status}' if self.status else 'did not answer'}: {self.message}"


class Limit(Protocol):
    """The limit of one attempt of a request."""

    def attempt(self) -> AbstractAsyncContextManager[None]:
        """Wrap the attempt; raise TimeoutError once it has taken too long."""
        ...

    def passed(self) -> str:
        """Return the error text for an attempt that has taken too long."""
        ...


class Connection:
    """The connections of one event loop, shared by all requests."""

    def __init__(self, key_for: Callable[[str], str | None]) -> None:
        """`key_for` returns the API key that belongs to a URL, or None to send no key."""
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
        """A clock that does not advance while the event loop of these connections is blocked."""
        if self._clock is None:
            self._clock = LoopClock()
        return self._clock

    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None or self._opened.closed:
            # aiohttp would hold back everything beyond 100 connections; the caller decides how much is in flight. Idle
            # connections are dropped before SGLang drops them (after 5 s), or a request would meet a closed one.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)
            # Engines belong to the run, so a proxy from the environment must not come between.
            self._opened = aiohttp.ClientSession(connector=connector, headers=_CONTENT, trust_env=False)
        return self._opened

    async def request(
        self,
        method: str,
        find_url: Callable[[], str | None],
        body: Message | bytes | None,
        *,
        timeout: float | Limit,
        collective: bool = False,
        patience: float = 0.0,
        before_retry: Callable[[float], Awaitable[None]] | None = None,
        decode: bool = True,
    ) -> Any:
        """Send a request and return its answer; retry if there was no connection or no engine available.

        Args:
            body: the message, or the JSON of one that is sent often or to many (see `encoded`).
            find_url: called before each attempt. None means that the receiver is no longer part of the run: the error
                of the last attempt is raised.
            timeout: the limit of one attempt: seconds in which the event loop runs, or another `Limit`.
            collective: the engine takes part in a collective operation, which must not begin twice. The request is
                repeated only if the first one cannot have reached the engine.
            patience: the least seconds to spend on connecting and on waits between attempts before giving up.
            before_retry: called with the seconds waited so far; an EngineError that it raises ends the attempts.
            decode: whether to decode the answer's JSON; otherwise its bytes are returned.
        """
        data = encoded(body) if isinstance(body, Message) else body
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
            except aiohttp.ConnectionTimeoutError:  # this is also a TimeoutError, so it comes first
                # Nothing was sent. This process itself may have been too busy with something else to connect.
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
                return _decode(url, raw) if decode else raw
            problem = EngineError(url, answer.status, _message(raw))
            if collective or not problem.may_pass:
                break
        raise problem

    async def ask_once(self, url: str, timeout: float) -> tuple[int, Any] | None:
        """GET `url`; return status and decoded answer (None if it is no JSON), or None if no answer came in time."""
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

    async def is_gone(self, url: str) -> bool:
        """Return whether nothing listens at `url` any more; a process that is only busy is not gone."""
        address = urlsplit(url)
        try:
            _, writer = await asyncio.open_connection(address.hostname, address.port)
        except OSError as error:  # others are this process's own, such as too many open files
            return error.errno in GONE
        writer.close()
        return False

    async def is_healthy(self, url: str, timeout: float) -> bool:
        """Return whether the engine or router at `url` is healthy; it is asked once."""
        try:
            async with (
                self.clock.timeout(timeout),
                self._session().get(url + Endpoint.HEALTH, timeout=aiohttp.ClientTimeout()) as answer,
            ):
                return answer.status == 200
        except (TimeoutError, aiohttp.ClientError, OSError):
            return False


def encoded(body: Message) -> bytes:
    """Return the JSON of a message."""
    return orjson.dumps(body.to_json())


def authorization(key: str | None) -> dict[str, str]:
    """Return the header that carries `key`, or no header without one."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


class _Seconds:
    """A Limit of some seconds in which the event loop runs."""

    def __init__(self, clock: LoopClock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds

    def attempt(self) -> AbstractAsyncContextManager[None]:
        return self._clock.timeout(self._seconds)

    def passed(self) -> str:
        return f"no answer within {self._seconds:g} s"


def _wait(retry: int, waited: float, patience: float) -> float | None:
    """Return the seconds before retry number `retry`, after `waited` seconds; None means no further retry."""
    if not patience:
        return BACKOFF * 2**retry if retry < RETRIES else None
    return min(BACKOFF * 2 ** min(retry, RETRIES), LONGEST_BACKOFF) if waited < patience else None


def _decode(url: str, raw: bytes) -> Any:
    if not raw.startswith((b"{", b"[")):  # SGLang answers some requests in plain text
        return {"message": raw.decode(errors="replace")}
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise EngineError(url, 200, f"the answer is no JSON: {error}") from error


def _message(raw: bytes) -> str:
    """Extract the engine's own words from an error body."""
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return raw.decode(errors="replace")[:500]
    if isinstance(data, Mapping):
        error = data.get("error")
        inner = error.get("message") if isinstance(error, Mapping) else error
        return str(inner or data.get("message") or data)[:2000]
    return str(data)[:2000]
