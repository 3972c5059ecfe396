"""The embedded engine: SGLang's HTTP protocol on a CPU, in one process with one model.

    python -m slime.engine.embedded.server --model-path DIR --port N

- Where it sits: the router (or the client, for what the router does not pass on) calls a handler here, which uses the
  `Scheduler` in its thread.
- Invariant: this thread never computes and the scheduler never waits for HTTP. A failed scheduler ends the process, and
  every open request is answered first. Bodies are JSON only: nothing is ever unpickled.
"""

from __future__ import annotations

import asyncio
import gc
import hmac
import logging
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict
from typing import Any

import torch
from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

from slime.engine.bucket_layout import dtype_name
from slime.engine.embedded.answers import error_answer, json_answer, read_body, read_no_fields
from slime.engine.embedded.cache import KVCache
from slime.engine.embedded.device_handlers import DeviceHandlers
from slime.engine.embedded.exchange import Exchange
from slime.engine.embedded.fixed_shapes import SPARE_ROWS, FixedShapes, find_sizes
from slime.engine.embedded.memory import EngineMemory
from slime.engine.embedded.model import Model
from slime.engine.embedded.scheduler import Request, Scheduler
from slime.engine.embedded.settings import Settings, parse_settings
from slime.engine.embedded.text import Text
from slime.engine.embedded.weight_handlers import WeightHandlers
from slime.engine.embedded.weights import EngineWeights
from slime.engine.protocol import (
    AbortRequest,
    Endpoint,
    GenerateRequest,
    PauseGeneration,
)

logger = logging.getLogger("slime.engine.embedded")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
MakeModel = Callable[..., Model]
"""A callable that makes the model from (architecture, dtype=...)."""
MAX_BODY = 32 * 1024**2
"""The most bytes of a body; weights do not come in a body."""
VERSION = "slime-embedded"
UNPROCESSABLE = 422
"""The status for a request that the model cannot answer: a retry, here or elsewhere, would get the same."""


class EngineFailed(RuntimeError):
    """The scheduler has failed, and the process will end."""


class Server:
    """HTTP handlers around one scheduler. Only the event loop touches their state; the scheduler's is its own."""

    def __init__(self, settings: Settings, *, make_model: MakeModel = Model) -> None:
        self._settings = settings
        self._model = make_model(settings.architecture, dtype=settings.dtype)
        self._text = Text(settings.model_path)
        cache = KVCache(
            settings.architecture,
            dtype=settings.dtype,
            rows=settings.max_running_requests,
            tokens=settings.max_total_tokens,
            spare_rows=SPARE_ROWS if settings.deterministic else 0,
            keeps_routes=settings.returns_routed_experts,
        )
        self._scheduler = Scheduler(
            self._model, cache, on_finished=self._from_scheduler, on_failure=self._scheduler_failed
        )
        self._weights = EngineWeights(self._model, self._scheduler, sessions=settings.update_sessions)
        self._weights.load(settings.model_path, version=settings.weight_version)
        if settings.deterministic:
            self._scheduler.fixed_shapes = FixedShapes(self._model, cache, find_sizes(self._model))
        self._weight_handlers = WeightHandlers(
            self._scheduler, self._weights, self._call, dist_timeout=settings.dist_timeout
        )
        self._memory = EngineMemory(self._scheduler, self._weights)
        self._device_handlers = DeviceHandlers(self._scheduler, self._weights, self._memory, self._call)
        self._exchange = Exchange(settings, self._text)
        self._names = random.Random()  # uuid4 would call the kernel, and release the GIL for that
        self._open: dict[int, asyncio.Future[Request]] = {}
        """Open requests by id() of the request: a rid may be used again as soon as its client has gone."""
        self._rids: set[str] = set()
        self._failure: BaseException | None = None
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        self._scheduler.start()

    def stop(self) -> None:
        self._scheduler.stop()

    # ---- from the scheduler's thread

    def _from_scheduler(self, finished: list[Request]) -> None:
        self._loop.call_soon_threadsafe(self._resolve, finished)

    def _scheduler_failed(self, error: BaseException) -> None:
        self._loop.call_soon_threadsafe(self._fail, error)

    # ---- in the event loop

    def _resolve(self, finished: list[Request]) -> None:
        for request in finished:
            future = self._open.get(id(request))
            if future is not None and not future.done():
                future.set_result(request)

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        for future in self._open.values():
            if not future.done():
                future.set_exception(EngineFailed(f"the engine has failed: {error!r}"))
        self._loop.call_later(0.5, self._ended.set)  # lets the answers go out

    async def wait_ended(self) -> int:
        """Wait for a signal or a failed scheduler, and return the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._ended.set)
        await self._ended.wait()
        return 1 if self._failure else 0

    async def _call(self, function: Callable[[], Any]) -> Any:
        """Run `function` in the scheduler's thread, between two steps."""
        if self._failure is not None:
            raise EngineFailed(f"the engine has failed: {self._failure!r}")
        waiting = asyncio.wrap_future(self._scheduler.call(function))
        ended = asyncio.ensure_future(self._ended.wait())
        await asyncio.wait({waiting, ended}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not waiting.done():
            waiting.cancel()
            raise EngineFailed("the engine is ending")
        return waiting.result()

    # ---- generation

    async def generate(self, http: web.Request) -> web.Response:
        asked = GenerateRequest.from_json(await read_body(http))
        self._memory.refuse_requests()
        rid = asked.rid or f"{self._names.getrandbits(128):032x}"
        if rid in self._rids:
            raise ValueError(f"Duplicate request ID detected: {rid!r} is in use by another request")
        request = self._exchange.to_request(asked, rid)
        if self._failure is not None:
            raise EngineFailed(f"the engine has failed: {self._failure!r}")
        future: asyncio.Future[Request] = self._loop.create_future()
        self._open[id(request)] = future
        self._rids.add(request.rid)
        self._scheduler.submit(request)
        try:
            done = await future
        except asyncio.CancelledError:  # the client has gone
            self._scheduler.call(lambda: self._scheduler.abort(lambda r: r is request))
            raise
        finally:
            del self._open[id(request)]
            self._rids.discard(request.rid)
        if done.error is not None:
            # Not a 5xx: the router would retry elsewhere, take the engine for broken and answer 503 for it.
            return error_answer(done.error, UNPROCESSABLE)
        return json_answer(self._exchange.to_answer(done, asked))

    async def abort(self, http: web.Request) -> web.Response:
        asked = AbortRequest.from_json(await read_body(http))
        if not asked.rid and not asked.abort_all:
            raise ValueError("an abort names a rid, or abort_all")
        # As in SGLang, a rid that is in use aborts every request whose own rid begins with it.
        known = asked.abort_all or asked.rid in self._rids
        chosen = lambda r: known and (asked.abort_all or r.rid.startswith(asked.rid))  # noqa: E731
        count = await self._call(lambda: self._scheduler.abort(chosen))
        return json_answer({"success": True, "message": f"{count} requests aborted"})

    async def pause(self, http: web.Request) -> web.Response:
        mode = PauseGeneration.from_json(await read_body(http)).mode
        await self._call(lambda: self._scheduler.pause(mode))
        return json_answer({"success": True, "message": f"Generation paused ({mode})."})

    async def resume(self, http: web.Request) -> web.Response:
        await read_no_fields(http)
        await self._call(self._scheduler.resume)
        return json_answer({"success": True, "message": "Generation continued."})

    async def flush(self, http: web.Request) -> web.Response:
        await read_no_fields(http)

        def flush() -> int:
            if not self._scheduler.num_running:
                self._scheduler.forget_prompts()
                self._scheduler.cache.clear()
            return self._scheduler.num_running

        running = await self._call(flush)
        if running:
            return error_answer(
                f"not flushed: {running} requests are running; pause with mode abort or retract first", 400
            )
        return json_answer({"success": True, "message": "Cache flushed."})

    # ---- state

    async def health(self, http: web.Request) -> web.Response:
        silent = time.monotonic() - self._scheduler.beat
        if self._failure is not None:
            return error_answer(f"the scheduler failed: {self._failure!r}", 503)
        if silent > self._settings.watchdog_timeout:
            return error_answer(f"the scheduler has been in one step for {silent:.0f} s", 503)
        return json_answer({"success": True})

    async def loads(self, http: web.Request) -> web.Response:
        """Answer like SGLang with the load of one data-parallel rank."""
        scheduler, s = self._scheduler, self._settings
        load = {
            "dp_rank": 0,
            "num_running_reqs": scheduler.num_running,
            "num_waiting_reqs": scheduler.num_waiting,
            "num_used_tokens": scheduler.num_tokens,
            "max_total_num_tokens": s.max_total_tokens,
            "max_running_requests": s.max_running_requests,
        }
        return json_answer({"version": VERSION, "loads": [load]})

    async def info(self, http: web.Request) -> web.Response:
        s = self._settings
        # The router loads a tokenizer from this path, and would ask the Hugging Face hub if the path has none.
        path = str(s.model_path) if self._text.available else ""
        return json_answer(
            {
                "model_path": path,
                "tokenizer_path": path,
                "served_model_name": s.served_model_name,
                "is_generation": True,
                "model_type": s.architecture.family,
                "architecture": asdict(s.architecture),
                "weight_version": self._scheduler.weight_version,
                "weights_complete": self._weights.complete,
                "released_memory": sorted(self._memory.released),
                "version": VERSION,
                "tp_size": 1,
                "dp_size": 1,
                "dtype": dtype_name(s.dtype),
                "enable_deterministic_inference": s.deterministic,
                "enable_return_routed_experts": s.returns_routed_experts,
                "context_length": s.context_length,
                "max_running_requests": s.max_running_requests,
                "max_total_num_tokens": s.max_total_tokens,
                "num_running_requests": self._scheduler.num_running,
                "num_waiting_requests": self._scheduler.num_waiting,
                "paused": self._scheduler.pause_mode,
            }
        )

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY, middlewares=[self._guard])
        for path, handler in {
            Endpoint.GENERATE: self.generate,
            Endpoint.ABORT_REQUEST: self.abort,
            Endpoint.PAUSE_GENERATION: self.pause,
            Endpoint.CONTINUE_GENERATION: self.resume,
            Endpoint.FLUSH_CACHE: self.flush,
        }.items():
            app.router.add_post(path, handler)
        self._weight_handlers.mount(app)
        self._device_handlers.mount(app)
        app.router.add_get(Endpoint.FLUSH_CACHE, self.flush)
        app.router.add_get(Endpoint.HEALTH, self.health)
        app.router.add_get(Endpoint.LOADS, self.loads)
        for path in (Endpoint.SERVER_INFO, Endpoint.MODEL_INFO, Endpoint.GET_SERVER_INFO, Endpoint.GET_MODEL_INFO):
            app.router.add_get(path, self.info)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the API key, and turn every error into an answer: 400 for the caller's errors, 500 for ours."""
        key = self._settings.api_key
        if key is not None and request.path != Endpoint.HEALTH:
            given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
            if not hmac.compare_digest(given, f"Bearer {key}".encode()):
                return error_answer("wrong or missing API key; send it as `Authorization: Bearer KEY`", 401)
        try:
            return await handler(request)
        except ValueError as error:
            return error_answer(str(error), 400)
        except web.HTTPException as error:  # no such path, another method, a body that is too large
            return error_answer(f"{request.method} {request.path}: {error.reason}", error.status)
        except Exception as error:
            logger.exception("%s failed", request.path)
            return error_answer(f"{request.path}: {error}", 500)


async def serve(settings: Settings, *, make_model: MakeModel = Model) -> int:
    """Listen until a signal arrives (return 0) or the scheduler fails (return 1)."""
    server = Server(settings, make_model=make_model)
    server.start()
    # Handlers are cancelled when their client goes, so that its request is aborted.
    runner = web.AppRunner(server.application(), access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, settings.host, settings.port, backlog=4096).start()
    logger.info("serving %s on %s:%d", settings.model_path, settings.host, settings.port)
    code = await server.wait_ended()
    await runner.cleanup()
    server.stop()
    return code


def _run(main: Coroutine[Any, Any, int]) -> int:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def _is_no_probe(record: logging.LogRecord) -> bool:
    """Return whether to log a record: the router first tries HTTP/2, which aiohttp would report with a traceback."""
    return not (record.exc_info and isinstance(record.exc_info[1], BadHttpMessage))


def main(argv: Sequence[str], *, make_model: MakeModel = Model) -> int:
    """Serve as `argv` requires. `make_model` replaces the forward pass under the same scheduler and protocol."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("aiohttp.server").addFilter(_is_no_probe)
    gc.freeze()  # what is imported lives as long as the process
    sys.setswitchinterval(0.0005)  # the scheduler gets the GIL back soon after every operator
    try:
        settings, threads = parse_settings(argv)
        torch.set_num_threads(threads)
        return _run(serve(settings, make_model=make_model))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
