"""Supervise the run's own engines and router: what dies or hangs is started again.

- Where it sits: the rollout manager holds one as soon as the engines are registered with the router. The driver
  (`weight_sync`) sends weights to a restarted engine and then has it admitted.
- Invariant: the router leads to an engine only while the engine holds the weights that the run last sent. Every loss is
  reported with its log file, and a process is restarted at most --max-engine-restarts times within an hour.

    serving --(dies, hangs)--> down --(its owner starts it)--> up, without weights --(sent, admitted)--> serving
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from slime.cluster.engines.engine_health import POLL_S, RestartLimit, first_trouble
from slime.config.args import Args
from slime.core.errors import Fault, RunError
from slime.engine.client import EngineClient
from slime.engine.launch import launch_router
from slime.engine.membership import Membership
from slime.engine.protocol import weight_groups
from slime.engine.server_process import ManagedProcess, find_free_port

NOTICED_S = 5 * POLL_S
"""Seconds within which a death is certainly noticed."""
AGAIN_S = 0.5
"""Seconds until a failed action is tried again."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineUp:
    """An engine that answers. `start` counts how often it had been started before."""

    index: int
    start: int
    url: str


@dataclass(frozen=True)
class EnginesState:
    """The engines and what happened to them: `up` answer, and `waiting` of them lack the run's weights.

    `news` holds the messages since the last call. `progress` grows while engines generate.
    """

    up: tuple[EngineUp, ...]
    waiting: tuple[EngineUp, ...] = ()
    news: tuple[str, ...] = ()
    progress: int = 0


@dataclass
class _Engine:
    index: int
    owner: Any
    """The EngineWorker that owns its process."""
    url: str
    start: int = 0
    up: bool = True
    serving: bool = True

    def shown(self) -> EngineUp:
        return EngineUp(self.index, self.start, self.url)


class EngineSupervisor:
    """Supervises the engines and the router inside the rollout manager's event loop."""

    def __init__(
        self,
        args: Args,
        *,
        client: EngineClient,
        membership: Membership,
        router: ManagedProcess | None,
        owners: Sequence[Any],
        urls: Sequence[str],
        others: Sequence[str] = (),
        log_dir: Path,
    ) -> None:
        """`owners` own the engines at `urls`; `others` are external engines at the same router.

        `router` is None if the router is external.
        """
        self._args = args
        self._client = client
        self._membership = membership
        self.router = router
        self._log_dir = log_dir
        self._others = others
        self._engines = [_Engine(index, *pair) for index, pair in enumerate(zip(owners, urls, strict=True))]
        self._asleep = False
        self._news: list[str] = []
        self._counts: Counter[str] = Counter()
        self._restarts = RestartLimit(args.max_engine_restarts)
        self._change = asyncio.Condition()
        self._failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._unless_it_fails(self._keep(engine))) for engine in self._engines]
        if router is not None:
            self._tasks.append(asyncio.create_task(self._unless_it_fails(self._keep_router(router))))

    # ---- for the manager

    def state(self) -> EnginesState:
        news, self._news = tuple(self._news), []
        up = [engine for engine in self._engines if engine.up]
        waiting = [engine.shown() for engine in up if not engine.serving]
        progress = self._client.num_answered + self._client.progress.num_moves
        return EnginesState(tuple(e.shown() for e in up), tuple(waiting), news, progress)

    def take_counts(self) -> dict[str, float]:
        """Return the counts `fault/*` since the last call; nothing if there was no fault."""
        counts, self._counts = self._counts, Counter()
        return {f"fault/{name}": count for name, count in counts.items()}

    async def failure(self) -> BaseException:
        """Wait until something has been lost for good, and return the error."""
        return await asyncio.shield(self._failed)

    @property
    def serves(self) -> bool:
        """Whether anything may be in flight at an engine. External engines always count."""
        return not self._engines or any(engine.serving for engine in self._engines)

    def joining_or_leaving(self) -> set[str]:
        """Return the URLs that the router's list may or may not hold at this moment."""
        return {engine.url for engine in self._engines if not engine.serving}

    async def wait_for_any(self) -> None:
        """Wait until an engine is up.

        Raises:
            RunError: no engine will come up any more.
        """
        await self._until(lambda: any(engine.up for engine in self._engines))

    async def lost_one_of(self, engines: Sequence[EngineUp]) -> bool:
        """Return whether one of these engines is gone; wait as long as it takes to notice a death."""
        clock = self._client.clock
        deadline = clock.time() + NOTICED_S
        while clock.time() < deadline:
            there = {engine.shown() for engine in self._engines if engine.up}
            if not there.issuperset(engines):
                return True
            await asyncio.sleep(POLL_S / 2)
        return False

    async def end_hanging(self) -> None:
        """End the engines that hang in a broadcast of weights, because it was broken by another engine's death.

        They leave the weight group if they do not hang. One that gives no answer in `presence.LEAVE_WITHIN_S` seconds
        is ended, and is restarted like one that has died. This returns after its end was noticed.
        """
        for url in await self._client.presence.hanging(*weight_groups(self._args.num_weight_owners)):
            for engine in [engine for engine in self._engines if engine.url == url and engine.up]:
                self._say(
                    f"engine {engine.index} ({url}) hangs in the weight sync that the loss of an engine has broken: it "
                    "is ended"
                )
                try:
                    await engine.owner.stop.remote()
                except RayError as error:  # its owner is lost, which is noticed, too
                    logger.warning("ending engine %d: %s", engine.index, _first_line(error))
                await self.lost_one_of([engine.shown()])

    async def admit(self, engines: Sequence[EngineUp]) -> None:
        """Add these engines, which hold the run's weights, to the router; one that was lost since is left out."""
        for shown in engines if self._engines else ():
            engine = self._engines[shown.index]
            if engine.shown() != shown or not engine.up or engine.serving:
                continue
            await self._at_router(lambda url=shown.url: self._membership.add(url), engine)
            engine.serving = engine.up and engine.shown() == shown
            if engine.serving and engine.start:
                self._say(f"engine {engine.index} generates again, at {engine.url}")

    async def before_sleep(self) -> None:
        """Wait for engines that are starting: they would take the memory that trainers are about to use."""
        await self._until(lambda: all(engine.up for engine in self._engines))
        self._asleep = True

    def awake(self) -> None:
        self._asleep = False

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.router is not None:
            self.router.stop()

    # ---- watching

    async def _unless_it_fails(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            logger.exception("the supervision of engines and router has failed")
            if not self._failed.done():
                self._failed.set_result(error)
            await self._changed()

    async def _keep(self, engine: _Engine) -> None:
        """Restart the engine whenever it is lost."""
        what = f"engine {engine.index}"
        while True:
            trouble = await self._trouble(lambda: _is_alive(engine.owner), engine.url)
            log = self._log_dir / f"engine-{engine.index}.log"
            lost = f"{what} ({engine.url}) {trouble}; its log is {log}"
            engine.up = engine.serving = False
            self._publish()
            if self._asleep:
                raise Fault(f"{lost}; it had given its memory to the trainers, and cannot start while they hold it")
            await asyncio.gather(
                self._start_engine(engine, lost), self._at_router(lambda url=engine.url: self._membership.remove(url))
            )
            engine.up = True
            self._publish()
            await self._changed()
            if self._args.debug_rollout_only:  # no weights are sent: those of --hf-checkpoint are the run's
                await self.admit([engine.shown()])

    async def _start_engine(self, engine: _Engine, lost: str) -> None:
        limit = self._args.engine_start_timeout
        while True:
            self._count(f"engine {engine.index}", lost)
            self._say(f"{lost}: it is started again")
            begin = time.monotonic()
            try:
                url = await asyncio.wait_for(engine.owner.restart.remote(), limit + self._args.engine_health_timeout)
            except (RayError, TimeoutError) as error:
                lost = f"engine {engine.index} did not start: {_first_line(error)}"
                await asyncio.sleep(AGAIN_S)
                continue
            engine.url, engine.start = url, engine.start + 1
            self._say(
                f"engine {engine.index} is up again after {time.monotonic() - begin:.1f} s, and waits for weights"
            )
            return

    async def _keep_router(self, router: ManagedProcess) -> None:
        """Restart the router whenever it is lost: at its address, unless another process has taken that."""
        while True:

            async def is_alive(process: ManagedProcess = router) -> bool:
                return process.alive()

            trouble = await self._trouble(is_alive, router.url)
            lost = f"the router ({router.url}) {trouble}; its log is {router.log_path}"
            self._count("router", lost)
            self._say(f"{lost}: it is started again")
            port = int(router.url.rpartition(":")[2])
            await asyncio.to_thread(router.stop)
            router = launch_router(
                self._args,
                host="127.0.0.1",
                port=port if _is_free(port) else find_free_port(),
                log_path=router.log_path,
            )
            self.router = router
            self._client.set_router(router.url)
            self._membership.url = router.url
            try:
                await asyncio.to_thread(router.wait_ready, self._args.engine_start_timeout)
            except RuntimeError as error:
                logger.warning("the router did not start: %s", error)
                continue
            for url in self._others:
                await self._at_router(lambda url=url: self._membership.add(url))
            for engine in self._engines:
                if engine.serving:
                    await self._at_router(lambda url=engine.url: self._membership.add(url), engine)
            self._say("the router is up again")

    async def _trouble(self, is_alive: Callable[[], Awaitable[bool]], url: str) -> str:
        """Return once something is wrong, with a description."""
        return await first_trouble(is_alive, url, self._client, limit=self._args.engine_health_timeout)

    # ---- reporting

    def _publish(self) -> None:
        """Update the client's list of engines to those that are up."""
        self._client.set_engines([engine.url for engine in self._engines if engine.up])

    async def _changed(self) -> None:
        async with self._change:
            self._change.notify_all()

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with self._change:
            await self._change.wait_for(lambda: condition() or self._failed.done())
        if not condition():
            raise self._failed.result()

    def _say(self, text: str) -> None:
        logger.warning("%s", text)
        self._news.append(f"FAULT {text}")

    def _count(self, what: str, lost: str) -> None:
        """Record that `what`, "engine 3" or "router", is restarted now.

        Raises:
            RunError: this is one restart too many within an hour.
        """
        if not self._restarts.allow(what, now=time.monotonic()):
            limit = self._args.max_engine_restarts
            raise RunError(
                f"{lost}; the {what} has been restarted {limit} times within an hour (--max-engine-restarts)"
            )
        self._counts[f"{what.split()[0]}_restarts"] += 1

    async def _at_router(self, action: Callable[[], None], engine: _Engine | None = None) -> None:
        """Repeat `action` until the router, which may be restarting itself, does it; give up if `engine` is lost.

        Raises:
            RunError: it does not succeed within --engine-start-timeout.
        """
        clock = self._client.clock
        deadline = clock.time() + self._args.engine_start_timeout
        while engine is None or engine.up:
            try:
                await asyncio.to_thread(action)
                return
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                if clock.time() > deadline:
                    raise RunError(f"the router did not accept a change to its list of engines: {error}") from error
            await asyncio.sleep(AGAIN_S)


async def _is_alive(owner: Any) -> bool:
    try:
        return await owner.alive.remote()
    except RayError:
        return False


def _first_line(error: BaseException) -> str:
    cause = error.__dict__.get("cause")
    return str(cause if isinstance(cause, BaseException) else error) or type(error).__name__


def _is_free(port: int) -> bool:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return True
    except OSError:
        return False
