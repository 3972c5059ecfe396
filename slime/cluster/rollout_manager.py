"""RolloutManager: everything between a prompt and a training batch, in one Ray actor.

- Where it sits: it holds the data side (`data_side`: prompts, rewards, state) and the engine side (`engine_side`: the
  router and the engines). Each rollout turns prompts into a TrainBatch for the trainers.
- Invariant: its state is the data side's; the engine side can be lost and made again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from slime.cluster.engines.engine_supervisor import EnginesState, EngineUp
from slime.cluster.manager.data_side import DataSide
from slime.cluster.manager.engine_side import NoEngines, connect
from slime.cluster.on_ray.portable import portable_errors
from slime.config.args import Args
from slime.config.rollout_plan import parts_of_rollout
from slime.config.router_policy import router_policy, with_router_policy
from slime.config.secrets import masker_of
from slime.core.batch import TrainBatch
from slime.core.rank_batch import RankBatch
from slime.engine.launch import start_router
from slime.engine.membership import external_router_url
from slime.engine.server_process import ManagedProcess
from slime.observability.logs import collected_warnings, log_to_file
from slime.observability.output_log import log_own_output
from slime.observability.progress import WorkProgress

logger = logging.getLogger(__name__)


@portable_errors
class RolloutManager:
    """Makes one rollout at a time, as an async Ray actor; evaluations and state calls may arrive meanwhile."""

    def __init__(self, args: Args, log_dir: str, *, alone: bool = False) -> None:
        """`alone`: this process is the manager's own, so that its whole output goes to the manager's log."""
        self._args = args
        self._is_alone = alone
        self._log_dir = Path(log_dir)
        self._cleanup = AsyncExitStack()
        self._router: ManagedProcess | None = None
        """The run's own router; None if it is external, or has not been started."""
        self._engines = NoEngines()

    @cached_property
    def _data(self) -> DataSide:
        """The data side, which is loaded at the first use: by `start`.

        An error in an actor's constructor would reach the driver only as the actor's death.
        """
        data = DataSide(self._args, self._log_dir)
        self._cleanup.callback(data.close)
        return data

    def start(self) -> list[str]:
        """Load tokenizer and prompts, make the reward pool, and return warnings. This call comes before all others."""
        path = log_to_file(self._log_dir, "rollout", masker := masker_of(self._args))
        if self._is_alone:
            log_own_output(path, masker)
        with collected_warnings() as warnings:
            _ = self._data
        return warnings

    def num_prompts(self) -> int:
        """Return the number of prompts in one epoch."""
        return self._data.num_prompts()

    async def start_router(self) -> str:
        """Start the router, or take the one that was given, and return its URL."""
        url = external_router_url(self._args)
        if url is None:
            policy = router_policy(self._args, self._data.mean_prompt_tokens)
            logger.info("router: %s: %s", policy.name, policy.why)
            self._args = with_router_policy(self._args, policy)  # the supervisor restarts the router with it
            self._router = await asyncio.to_thread(
                start_router, self._args, self._log_dir / "router.log", keep=self._stop_at_the_end
            )
            url = self._router.url
        return url

    def _stop_at_the_end(self, router: ManagedProcess) -> None:
        self._cleanup.callback(router.stop)

    async def connect_engines(self, router_url: str, engine_urls: list[str], engines: list[Any]) -> None:
        """Register the engines with the router and make the client. `engines`: the owners of the run's own engines."""
        self._engines, self._data.context.client = await connect(
            self._args,
            router_url=router_url,
            router=self._router,
            urls=engine_urls,
            owners=engines,
            log_dir=self._log_dir,
            cleanup=self._cleanup,
        )

    async def put_engines_to_sleep(self) -> None:
        """Let the engines give back all memory; nothing is in flight when this is called."""
        await self._engines.put_to_sleep()

    async def wake_engines(self, *, to_generate: bool) -> None:
        """Let the engines take memory again: first that of the weights, which are sent next, then all, to generate."""
        await self._engines.wake(to_generate=to_generate)

    async def weights_change(self) -> None:
        """Mark the beginning of a weight sync, so that requests that wait for it do not count as stuck.

        `set_policy_version` marks its end.
        """
        self._engines.hold(True)

    async def set_policy_version(self, version: int, engines: Sequence[EngineUp] = ()) -> None:
        """Record that `engines` hold `version`, admit them to the router, and check the router's engines."""
        await self._engines.admit(engines)
        self._data.context.policy_version = version
        self._engines.hold(False)

    async def engines_state(self) -> EnginesState:
        """Return the engines that are up."""
        return self._engines.state()

    async def state_with_engines(self) -> EnginesState:
        """Return the engines that are up, once there is at least one."""
        return await self._engines.state_with_engines()

    async def lost_one_of(self, engines: Sequence[EngineUp]) -> bool:
        """Return whether one of these engines is gone; a death is noticed a moment after it happens."""
        return await self._engines.lost_one_of(engines)

    async def generate(self, rollout_id: int) -> tuple[TrainBatch, dict[str, float]]:
        """Make one rollout and return its training batch and its metrics."""
        start = time.perf_counter()
        batch, metrics = await self._data.generate(rollout_id, self._engines)
        metrics |= self._engines.take_counts()
        return batch, {**metrics, "time/rollout": time.perf_counter() - start}

    async def generate_parts(self, rollout_id: int) -> tuple[RankBatch | dict[str, float], ...]:
        """Make one rollout; return each data-parallel rank's part of it, and then its metrics.

        Each of them becomes an object of its own in Ray's store, so a trainer fetches its own rows only.
        """
        batch, metrics = await self.generate(rollout_id)
        # in a thread: evaluations and the driver's questions go on meanwhile
        parts = await asyncio.to_thread(self._parts, batch, self._args.resolved.num_steps_per_rollout)
        return *parts, metrics

    def _parts(self, batch: TrainBatch, num_steps: int) -> list[RankBatch]:
        return parts_of_rollout(self._args, batch, num_ranks=self._args.data_parallel_size, num_steps=num_steps)

    async def progress(self) -> WorkProgress:
        """Count what is generated and evaluated now; the driver asks often, so this is cheap."""
        return self._data.context.progress.look()

    async def evaluate(self, rollout_id: int) -> dict[str, float]:
        """Evaluate after `rollout_id` rollouts and return the metrics."""
        return await self._data.evaluate(rollout_id, self._engines)

    def validation_parts(self) -> tuple[dict[str, RankBatch] | list[str], ...]:
        """Return each data-parallel rank's rows of SFT's evaluation sets by their names, and then these names."""
        sets = {name: self._parts(batch, 1) for name, batch in self._data.validation_sets().items()}
        ranks = range(self._args.data_parallel_size)
        return *({name: parts[rank] for name, parts in sets.items()} for rank in ranks), list(sets)

    async def abort(self, rollout_id: int) -> bool:
        """Abort this rollout for good; return False if it is whole already (see `DataSide.abort`)."""
        return await self._data.abort(rollout_id)

    async def abort_evaluation(self) -> None:
        """Abort the evaluation that runs."""
        await self._data.abort_evaluation()

    def state_dict(self, next_rollout_id: int = 0) -> dict[str, Any]:
        """Return the state as plain JSON types and arrays (see `DataSide.state_dict`)."""
        return self._data.state_dict(next_rollout_id)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state that `state_dict` returned."""
        self._data.load_state_dict(state)

    async def close(self) -> None:
        """End the engines' supervision, the router and the reward workers, in this order."""
        await self._cleanup.aclose()
