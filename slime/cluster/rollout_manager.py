"""RolloutManager: everything between a prompt and a training batch, in one Ray actor.

- Where it sits: it holds the data source, the reward workers, the router and the client of the engines. Each rollout
  turns prompts into a TrainBatch for the trainers.
- Invariant: its `state_dict` is the whole data side of a checkpoint, also while a rollout is generated and while a
  whole rollout waits for the loop to take it.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from slime.cluster.engine_health import EngineWatch, Watched, answering
from slime.cluster.engine_supervisor import EngineUp, Fleet, FleetState
from slime.config.args import Args
from slime.config.secrets import masker_of
from slime.core.batch import TrainBatch, from_samples
from slime.core.errors import Fault
from slime.core.masking import mask_output
from slime.core.plugins import load_hook
from slime.core.sample import Sample
from slime.engine.client import EngineClient
from slime.engine.external import free_engines
from slime.engine.keys import Keys
from slime.engine.launch import launch_router
from slime.engine.membership import Membership, external_router_url
from slime.engine.server_process import ManagedProcess, find_free_port, start_at_free_port
from slime.engine.sleep import FOR_GENERATION, FOR_WEIGHTS, put_to_sleep
from slime.observability.logs import collected_warnings, log_to_file
from slime.rollout.acceptance import mask_truncated
from slime.rollout.context import RolloutContext, RolloutResult
from slime.rollout.dump import read_replay, write_dump
from slime.rollout.evaluate import Evaluator
from slime.rollout.generate import sampling_record
from slime.rollout.in_flight import TrackedSource
from slime.rollout.metrics import replay_metrics
from slime.rollout.reward_pool import RewardPool
from slime.rollout.tokenizer import load_tokenizer

T = TypeVar("T")


@dataclass
class _Made:
    """A whole rollout in plain JSON types, so later changes to its samples do not show in it."""

    rollout_id: int
    groups: list[list[dict[str, Any]]]
    metrics: dict[str, float]

    @classmethod
    def of(cls, rollout_id: int, groups: list[list[Sample]], metrics: dict[str, float]) -> _Made:
        lasting = {name: value for name, value in metrics.items() if not name.startswith("time/")}
        return cls(rollout_id, [[sample.to_dict() for sample in group] for group in groups], lasting)

    def result(self) -> RolloutResult:
        groups = [[Sample.from_dict(sample) for sample in group] for group in self.groups]
        return RolloutResult(groups, dict(self.metrics))


class RolloutManager:
    """Makes one rollout at a time, as an async Ray actor; evaluations and state calls may arrive meanwhile."""

    def __init__(self, args: Args, log_dir: str) -> None:
        self._args = args
        self._log_dir = Path(log_dir)
        self._router: ManagedProcess | None = None
        self._membership: Membership | None = None
        self._watch: EngineWatch | None = None
        self._fleet: Fleet | None = None
        self._client: EngineClient | None = None
        self._rewards: RewardPool | None = None
        self._evaluator: Evaluator | None = None
        self._data_source: TrackedSource | None = None
        self._made: _Made | None = None
        """The last whole rollout; the loop may still be busy with the one before it."""

    def start(self) -> list[str]:
        """Load tokenizer and prompts, make the reward pool, and return warnings. This call comes before all others."""
        log_to_file(self._log_dir, "rollout", masker := masker_of(self._args))
        mask_output(masker)
        with collected_warnings() as warnings:
            self._load()
        return warnings

    def _load(self) -> None:
        args = self._args
        tokenizer = load_tokenizer(args)
        if args.prompt_data is not None or args.has_own_data_source:
            self._data_source = TrackedSource(load_hook("data_source_path", args.data_source_path)(args, tokenizer))
        self._rollout_function = load_hook("rollout_function_path", args.rollout_function_path)
        self._rewards = RewardPool(args)
        self._context = RolloutContext(args=args, client=None, tokenizer=tokenizer, rewards=self._rewards)

    def num_prompts(self) -> int:
        """Return the number of prompts in one epoch."""
        assert self._data_source is not None, "the rules require --prompt-data with --num-epoch"
        return self._data_source.num_prompts

    async def start_router(self) -> str:
        """Start the router, or take the one that was given, and return its URL."""
        args = self._args
        url = external_router_url(args)
        if url is not None:
            return url

        def launch(port: int) -> ManagedProcess:
            return launch_router(args, host="127.0.0.1", port=port, log_path=self._log_dir / "router.log")

        def keep(process: ManagedProcess) -> None:
            self._router = process

        process = await asyncio.to_thread(
            start_at_free_port, launch, port=find_free_port, timeout=args.engine_start_timeout, keep=keep
        )
        return process.url

    async def connect_engines(self, router_url: str, engine_urls: list[str], engines: list[Any]) -> None:
        """Register the engines with the router and make the client. `engines`: the owners of the run's own engines."""
        args = self._args
        keys = Keys.of(args)
        self._membership = Membership(router_url, keys=keys, timeout=args.engine_start_timeout)
        await asyncio.to_thread(self._membership.join, engine_urls)
        self._client = client = EngineClient(
            router_url,
            engines=engine_urls,
            keys=keys,
            request_timeout=args.engine_request_timeout,
            patience=args.engine_start_timeout + args.engine_health_timeout,
        )
        self._context.client = client
        watched: list[Watched] = []
        if self._router is None:
            watched.append(answering("the router", router_url, client))
        if args.rollout_external_engines:
            await free_engines(client)
            watched += [answering("the engine", url, client) for url in engine_urls]
        self._watch = EngineWatch(watched)
        self._fleet = Fleet(
            args,
            client=client,
            membership=self._membership,
            router=self._router,
            owners=engines,
            urls=[] if args.rollout_external_engines else engine_urls,
            others=args.rollout_external_engines,
            log_dir=self._log_dir,
        )

    async def put_engines_to_sleep(self) -> None:
        """Let the engines give back all memory; nothing is in flight when this is called."""
        assert self._client is not None, "there are engines"
        assert self._fleet is not None, "there are engines"
        await self._fleet.before_sleep()
        await put_to_sleep(self._client, abort=self._fleet.serves)

    async def wake_engines(self, *, to_generate: bool) -> None:
        """Let the engines take memory again: first that of the weights, which are sent next, then all, to generate."""
        assert self._client is not None, "there are engines"
        assert self._fleet is not None, "there are engines"
        await self._client.resume_memory(FOR_GENERATION if to_generate else FOR_WEIGHTS)
        if to_generate:
            self._fleet.awake()

    async def weights_change(self) -> None:
        """Mark the beginning of a weight sync, so that requests that wait for it do not count as stuck.

        `set_policy_version` marks its end.
        """
        if self._client is not None:
            self._client.progress.hold(True)

    async def set_policy_version(self, version: int, engines: Sequence[EngineUp] = ()) -> None:
        """Record that `engines` hold `version`, admit them to the router, and check the router's engines."""
        if self._fleet is not None and not self._args.rollout_external_engines:  # external engines never leave it
            await self._fleet.admit(engines)
        await self._check_router()
        self._context.policy_version = version
        if self._client is not None:
            self._client.progress.hold(False)

    async def fleet_state(self) -> FleetState:
        """Return the engines that are up."""
        assert self._fleet is not None, "there are engines"
        if self._args.rollout_external_engines:
            urls = enumerate(self._args.rollout_external_engines)
            return replace(self._fleet.state(), up=tuple(EngineUp(index, 0, url) for index, url in urls))
        return self._fleet.state()

    async def fleet_with_engines(self) -> FleetState:
        """Return the engines that are up, once there is at least one."""
        assert self._fleet is not None, "there are engines"
        if not self._args.rollout_external_engines:
            await self._fleet.wait_for_any()
        return await self.fleet_state()

    async def lost_one_of(self, engines: Sequence[EngineUp]) -> bool:
        """Return whether one of these engines is gone; a death is noticed a moment after it happens."""
        assert self._fleet is not None, "there are engines"
        return not self._args.rollout_external_engines and await self._fleet.lost_one_of(engines)

    async def generate(self, rollout_id: int) -> tuple[TrainBatch, dict[str, float]]:
        """Make one rollout and return its training batch and its metrics."""
        start = time.perf_counter()
        args = self._args
        if args.load_debug_rollout_data is not None:
            groups, sampled = read_replay(args, rollout_id)
            metrics = replay_metrics(args, groups)
        else:
            result = await self._make(rollout_id)
            groups, metrics = result.groups, result.metrics
            sampled = sampling_record(args)
        if args.save_debug_rollout_data is not None:
            write_dump(Path(args.save_debug_rollout_data.format(rollout_id=rollout_id)), groups, sampled)
        samples = [sample for group in groups for sample in group]
        self._write_samples(rollout_id, samples)
        if args.custom_rollout_log_function_path is not None:
            log = load_hook("custom_rollout_log_function_path", args.custom_rollout_log_function_path)
            log(args, rollout_id, samples, metrics)
        batch = self._to_batch(samples)
        if self._fleet is not None:
            metrics |= self._fleet.take_counts()
        return batch, {**metrics, "time/rollout": time.perf_counter() - start}

    async def _make(self, rollout_id: int) -> RolloutResult:
        """Return the rollout's groups; a resumed run may have them already."""
        if self._made is not None and self._made.rollout_id == rollout_id:
            return self._made.result()
        result = await self._guarded(self._call_rollout_function(rollout_id))
        if self._args.rollouts_ahead:  # otherwise it is trained on before anything is saved
            self._made = _Made.of(rollout_id, result.groups, result.metrics)
        if self._data_source is not None:
            self._data_source.forget(rollout_id)
        return result

    async def _call_rollout_function(self, rollout_id: int) -> RolloutResult:
        result = self._rollout_function(self._args, rollout_id, self._data_source, self._context)
        return await result if inspect.isawaitable(result) else result

    def _to_batch(self, samples: list[Sample]) -> TrainBatch:
        args = self._args
        mask_truncated(args, samples)
        if args.custom_convert_samples_to_train_data_path is not None:
            path = args.custom_convert_samples_to_train_data_path
            return load_hook("custom_convert_samples_to_train_data_path", path)(args, samples)
        return from_samples(samples, args.reward_key)

    async def evaluate(self, rollout_id: int) -> dict[str, float]:
        return await self._guarded(self._call_eval_function(rollout_id))

    async def _call_eval_function(self, rollout_id: int) -> dict[str, float]:
        path = self._args.eval_function_path
        if path is not None:
            result = load_hook("eval_function_path", path)(self._args, rollout_id, self._context)
            return await result if inspect.isawaitable(result) else result
        if self._evaluator is None:
            self._evaluator = Evaluator(self._args, self._context.tokenizer)
        return await self._evaluator.run(rollout_id, self._context)

    async def _guarded(self, work: Awaitable[T]) -> T:
        """Await `work`; if an engine or the router is lost for good first, raise an error that names it."""
        if self._watch is None or self._fleet is None:
            return await work
        await self._check_router()
        task = asyncio.ensure_future(work)
        death = asyncio.ensure_future(self._watch.first_death())
        failure = asyncio.ensure_future(self._fleet.failure())
        await asyncio.wait({task, death, failure}, return_when=asyncio.FIRST_COMPLETED)
        lost = Fault(death.result()) if death.done() else failure.result() if failure.done() else None
        death.cancel()
        failure.cancel()
        if lost is None:
            result = task.result()
            await self._check_router()
            await self._check_weights()
            return result
        task.cancel()
        await asyncio.wait({task})
        raise lost

    async def _check_router(self) -> None:
        """Check that an external router leads to exactly the run's engines, also after a rollout.

        Raises:
            EngineError: naming the engines that are missing or unexpected.
        """
        if self._client is not None and self._router is None:
            await self._client.check_router(
                joining_or_leaving=() if self._fleet is None else self._fleet.joining_or_leaving()
            )

    async def _check_weights(self) -> None:
        """Check that external engines still hold the weights: whoever restarts one brings back its first weights.

        Raises:
            RuntimeError: an engine does not report the policy version that it was sent.
        """
        if not self._args.rollout_external_engines or self._args.debug_rollout_only:
            return
        assert self._client is not None, "there are engines"
        version = self._context.policy_version
        right = {str(version + ahead) for ahead in range(1 + self._args.rollouts_ahead)}  # the next may be arriving
        reports = zip(await self._client.workers(), await self._client.weight_versions(), strict=True)
        wrong = [f"{url} reports {version}" for url, version in reports if version not in right]
        if wrong:
            raise RuntimeError(
                f"engines have lost policy version {version} while it was generated with: {', '.join(wrong)}; it was "
                "restarted, or another run sends it weights"
            )

    def _write_samples(self, rollout_id: int, samples: list[Sample]) -> None:
        """Write a few whole samples, readable, into rollout_samples.txt next to the logs."""
        count = self._args.log_samples_per_rollout
        if not count:
            return
        step = max(1, len(samples) // count)
        with (self._log_dir / "rollout_samples.txt").open("a") as file:
            for sample in samples[::step][:count]:
                prompt = self._context.decode(sample.prompt_tokens, skip_special_tokens=False)
                file.write(
                    f"=== rollout {rollout_id} sample {sample.index} reward {sample.reward} {sample.status} "
                    f"label {sample.label}\n{prompt}⟫{sample.response}\n"
                )

    def state_dict(self, next_rollout_id: int = 0) -> dict[str, Any]:
        """Return the state as plain JSON types.

        `next_rollout_id` is the first rollout that has not been trained on; if it is made already, the state holds it.
        """
        waits = self._made is not None and self._made.rollout_id >= next_rollout_id
        return {
            "data_source": None if self._data_source is None else self._data_source.state_dict(),
            "made": dict(vars(self._made)) if waits else None,
            "policy_version": self._context.policy_version,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._data_source is not None and state["data_source"] is not None:
            self._data_source.load_state_dict(state["data_source"])
        self._made = None if state.get("made") is None else _Made(**state["made"])
        self._context.policy_version = state["policy_version"]

    async def close(self) -> None:
        if self._fleet is not None:
            await self._fleet.close()
        if self._client is not None:
            if self._args.rollout_external_engines:
                await free_engines(self._client)
            await self._client.close()
        if self._rewards is not None:
            self._rewards.close()
        if self._fleet is None and self._router is not None:
            self._router.stop()
        if self._router is None and self._membership is not None:
            await asyncio.to_thread(self._membership.leave)
