"""The engine side of the rollout manager: the run's own engines, external ones, or none.

- Used by: the rollout manager holds one of `NoEngines`, `OwnEngines` and `ExternalEngines`. It begins with `NoEngines`,
  and `connect` returns one of the other two once the engines answer.
- Invariant: all three have the same verbs, so that nothing else asks whether there are engines, or whose they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from slime.cluster.engines.engine_health import EngineWatch, answering
from slime.cluster.engines.engine_supervisor import EnginesState, EngineSupervisor, EngineUp
from slime.config.args import Args
from slime.core.errors import Fault
from slime.engine.client import EngineClient
from slime.engine.external import free_engines
from slime.engine.keys import Keys
from slime.engine.membership import Membership
from slime.engine.protocol import weight_groups
from slime.engine.server_process import ManagedProcess
from slime.engine.sleep import FOR_GENERATION, FOR_WEIGHTS, put_to_sleep
from slime.rollout.context import RolloutContext

T = TypeVar("T")


class NoEngines:
    """The engine side of a run that generates nothing, and of any run until its engines are connected."""

    async def put_to_sleep(self) -> None:
        """Let the engines give back all memory; nothing is in flight when this is called."""

    async def wake(self, *, to_generate: bool) -> None:
        """Let the engines take memory again: first that of the weights, which are sent next, then all, to generate."""

    def hold(self, on: bool) -> None:
        """Begin or end a time in which requests that wait do not count as stuck, because weights are sent."""

    async def admit(self, engines: Sequence[EngineUp]) -> None:
        """Admit `engines`, which hold the run's weights, to the router, and check the router's engines."""

    def state(self) -> EnginesState:
        """Return the engines that are up."""
        return EnginesState(up=())

    async def state_with_engines(self) -> EnginesState:
        """Return the engines that are up, once there is at least one."""
        return self.state()

    async def lost_one_of(self, engines: Sequence[EngineUp]) -> bool:
        """Return whether a weight sync has lost one of these engines; a death is noticed a moment after it happens.

        If so, the others do not hang in the sync's broadcast any more: those that did were ended.
        """
        return False

    def take_counts(self) -> dict[str, float]:
        """Return the counts `fault/*` since the last call."""
        return {}

    async def guarded(self, work: Awaitable[T], context: RolloutContext) -> T:
        """Await `work`; if an engine or the router is lost for good first, raise an error that names it."""
        return await work


class _ConnectedEngines(NoEngines):
    """Engines at a router that may be the run's own or external, with the run's client of them."""

    def __init__(
        self,
        args: Args,
        *,
        client: EngineClient,
        supervisor: EngineSupervisor,
        watch: EngineWatch,
        own_router: bool,
    ) -> None:
        """`supervisor` restarts what is the run's own, and `watch` watches what is external."""
        self._args = args
        self._client = client
        self._supervisor = supervisor
        self._watch = watch
        self._own_router = own_router

    async def put_to_sleep(self) -> None:
        await self._supervisor.before_sleep()
        await put_to_sleep(self._client, abort=self._supervisor.serves)

    async def wake(self, *, to_generate: bool) -> None:
        await self._client.resume_memory(FOR_GENERATION if to_generate else FOR_WEIGHTS)
        if to_generate:
            self._supervisor.awake()

    def hold(self, on: bool) -> None:
        self._client.progress.hold(on)

    async def admit(self, engines: Sequence[EngineUp]) -> None:
        await self._supervisor.admit(engines)
        await self._check_router()

    def state(self) -> EnginesState:
        return self._supervisor.state()

    def take_counts(self) -> dict[str, float]:
        return self._supervisor.take_counts()

    async def guarded(self, work: Awaitable[T], context: RolloutContext) -> T:
        await self._check_router()
        task = asyncio.ensure_future(work)
        death = asyncio.ensure_future(self._watch.first_death())
        failure = asyncio.ensure_future(self._supervisor.failure())
        await asyncio.wait({task, death, failure}, return_when=asyncio.FIRST_COMPLETED)
        lost = Fault(death.result()) if death.done() else failure.result() if failure.done() else None
        death.cancel()
        failure.cancel()
        if lost is None:
            result = task.result()
            await self._check_router()
            return result
        task.cancel()
        await asyncio.wait({task})
        raise lost

    async def _check_router(self) -> None:
        """Check that an external router leads to exactly the run's engines, also after a rollout.

        Raises:
            EngineError: naming the engines that are missing or unexpected.
        """
        if not self._own_router:
            await self._client.check_router(joining_or_leaving=self._supervisor.joining_or_leaving())


class OwnEngines(_ConnectedEngines):
    """The run's own engines, which `EngineSupervisor` restarts."""

    async def state_with_engines(self) -> EnginesState:
        await self._supervisor.wait_for_any()
        return self.state()

    async def lost_one_of(self, engines: Sequence[EngineUp]) -> bool:
        lost = await self._supervisor.lost_one_of(engines)
        if lost:
            await self._supervisor.end_hanging()
        return lost


class ExternalEngines(_ConnectedEngines):
    """The engines of --rollout-external-engines: all are up as long as they answer, and nobody restarts them."""

    def state(self) -> EnginesState:
        urls = enumerate(self._args.rollout_external_engines)
        return replace(super().state(), up=tuple(EngineUp(index, 0, url) for index, url in urls))

    async def guarded(self, work: Awaitable[T], context: RolloutContext) -> T:
        result = await super().guarded(work, context)
        if not self._args.debug_rollout_only:
            await self._check_weights(context.policy_version)
        return result

    async def _check_weights(self, version: int) -> None:
        """Check that the engines still hold the run's weights; one that somebody has restarted has its first weights.

        Raises:
            RuntimeError: an engine does not report the policy version that it was sent.
        """
        right = {str(version + ahead) for ahead in range(1 + self._args.rollouts_ahead)}  # the next may be arriving
        reports = zip(await self._client.workers(), await self._client.weight_versions(), strict=True)
        wrong = [f"{url} reports {reported}" for url, reported in reports if reported not in right]
        if wrong:
            raise RuntimeError(
                f"engines have lost policy version {version} while a rollout was generated with it: "
                f"{', '.join(wrong)}; they were restarted, or another run sends them weights"
            )


async def connect(
    args: Args,
    *,
    router_url: str,
    router: ManagedProcess | None,
    urls: Sequence[str],
    owners: Sequence[Any],
    log_dir: Path,
    cleanup: AsyncExitStack,
) -> tuple[NoEngines, EngineClient]:
    """Register the engines at `urls` with the router, and return them with the client of them.

    Args:
        args: the run's arguments; they determine whether the engines are external.
        router_url: the router's URL.
        router: its process, if it is the run's own.
        urls: all engines.
        owners: the `EngineWorker` of each engine, if they are the run's own.
        log_dir: where the engines' logs are.
        cleanup: what ends or leaves each part, pushed as soon as the part exists.

    Raises:
        RuntimeError: the router has engines of others, or did not accept one of these in time.
    """
    keys = Keys.of(args)
    membership = Membership(router_url, keys=keys, timeout=args.engine_start_timeout)
    if router is None:
        cleanup.push_async_callback(asyncio.to_thread, membership.leave)
    await asyncio.to_thread(membership.join, urls)
    client = EngineClient(
        router_url,
        engines=urls,
        keys=keys,
        request_timeout=args.engine_request_timeout,
        patience=args.engine_start_timeout + args.engine_health_timeout,
    )
    cleanup.push_async_callback(client.close)
    watched = [answering("the router", router_url, client)] if router is None else []
    external = args.rollout_external_engines
    if external:
        groups = weight_groups(args.num_weight_owners)
        cleanup.push_async_callback(free_engines, client, groups)
        await free_engines(client, groups)
        watched += [answering("the engine", url, client) for url in urls]
    supervisor = EngineSupervisor(
        args,
        client=client,
        membership=membership,
        router=router,
        owners=owners,
        urls=() if external else urls,
        others=external,
        log_dir=log_dir,
    )
    cleanup.push_async_callback(supervisor.close)
    kind = ExternalEngines if external else OwnEngines
    side = kind(args, client=client, supervisor=supervisor, watch=EngineWatch(watched), own_router=router is not None)
    return side, client
