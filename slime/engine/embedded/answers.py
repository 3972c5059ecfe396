"""Read JSON bodies, write JSON answers, and run blocking work in a thread.

- Called by: `server` and `weight_handlers`.
- Invariant: an error has one form, whichever code raised it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import orjson
from aiohttp import web
from aiohttp.http_exceptions import PayloadEncodingError

from slime.core.printable import one_line
from slime.engine.message import short

T = TypeVar("T")


def json_answer(data: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(data), status=status, content_type="application/json")


def error_answer(message: str, status: int) -> web.Response:
    """Return an error of bounded length: a message may name a value of the request, whatever its length."""
    message = one_line(message)
    return json_answer({"success": False, "message": message, "error": {"message": message}}, status)


async def read_body(request: web.Request) -> Any:
    """Return the decoded JSON, or {} for an empty body. Raises ValueError if it is no JSON or cannot be unpacked."""
    try:
        raw = await request.read()
    except (PayloadEncodingError, web.RequestPayloadError) as error:  # the body does not fit its Content-Encoding
        raise ValueError(f"the body cannot be read: {error}") from error
    try:
        return orjson.loads(raw) if raw else {}
    except orjson.JSONDecodeError as error:
        raise ValueError(f"the body is no JSON: {error}") from error


async def read_no_fields(request: web.Request) -> None:
    """Read the body of an endpoint without fields. Raises ValueError if it is neither empty nor `{}`."""
    body = await read_body(request)
    if body != {}:
        raise ValueError(f"the body is {short(body)}; {request.path} takes no fields: send {{}}")


async def in_daemon_thread(function: Callable[[], T]) -> T:
    """Run something that may block for long; a thread of asyncio's own pool would keep the process from ending."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # from here on it cannot be cancelled, only ignored

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:  # noqa: BLE001 - handed to the caller
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)
