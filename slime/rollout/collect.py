"""One rollout: prompts out, responses and rewards in, until a batch of groups is kept.

Path: draws groups from the data source; every sample is a task of its own (generate, then judge); a finished group is
filtered; kept groups go to `core.batch`. Invariant: a group drawn is either kept, dropped for a counted reason, or
given back to the data source as bare prompts; none is lost, and all tokens kept are of one policy.

    get_groups -> [generate -> judge] x n -> settle -+-> kept (until --rollout-batch-size, then the rest is aborted)
         ^                                           +-> dropped (filter, failed generation or rewards), counted
         +---- surplus, aborted: bare prompts -------+
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from slime.config.args import Args
from slime.core.plugins import load_hook
from slime.core.sample import Sample, Status
from slime.engine.client import EngineError
from slime.rollout.context import DataSource, RolloutContext, RolloutResult, gather_or_cancel, request_slots
from slime.rollout.generate import Generate, load_generate, rollout_sampling_params, sampling_seed
from slime.rollout.intervals import PhaseIntervals
from slime.rollout.rm_hub.verdict import failure_kind
from slime.rollout.rollout_metrics import Tally, rollout_metrics

logger = logging.getLogger(__name__)

_ABORT_TIMEOUT = 60.0
"""Seconds within which the engines have to end every request after an abort."""
_ABORT_INTERVAL = 0.25
"""Seconds between two aborts: a request on its way through the router misses the one before."""

_NO_GROUP_BASELINE = ("reinforce_plus_plus", "ppo")


async def generate_rollout(
    args: Args, rollout_id: int, data_source: DataSource, context: RolloutContext
) -> RolloutResult:
    """`--rollout-batch-size` groups, generated, judged and filtered.

    Raises:
        RuntimeError: nothing was kept in --max-empty-waves waves, every request of a wave failed, or the engines
            do not end aborted requests.
    """
    collector = _Collector(args, rollout_id, data_source, context, await request_slots(args, context))
    groups = await collector.run()
    samples = [sample for group in groups for sample in group]
    metrics = rollout_metrics(args, groups, collector.tally, collector.intervals, context.policy_version)
    _post_process(args, samples)
    return RolloutResult(groups, metrics)


@dataclass
class _Wave:
    """`--over-sampling-batch-size` groups, in the order in which they are drawn."""

    drawn: int = 0
    settled: int = 0
    kept: int = 0
    failed: int = 0


class _Collector:
    """One rollout in progress."""

    def __init__(
        self, args: Args, rollout_id: int, data_source: DataSource, context: RolloutContext, slots: asyncio.Semaphore
    ) -> None:
        self._args = args
        self._rollout_id = rollout_id
        self._data_source = data_source
        self._context = context
        self._slots = slots
        self._generate: Generate = load_generate(args)
        self._params = rollout_sampling_params(args)
        self._filter = _load_filter(args)
        self._wave_size = args.over_sampling_batch_size or args.rollout_batch_size
        self._pending: dict[asyncio.Task[list[Sample]], tuple[list[Sample], _Wave]] = {}
        """Tasks of groups, the groups as they were drawn, and their waves."""
        self._kept: list[list[Sample]] = []
        self._surplus: list[list[Sample]] = []
        self._stopping = False
        self._waves: list[_Wave] = []
        self._empty_waves = 0
        self._last_error: EngineError | None = None
        self.tally = Tally()
        self.intervals = PhaseIntervals()

    async def run(self) -> list[list[Sample]]:
        """The kept groups; what was not needed is back in the data source when this returns."""
        try:
            while self._num_missing() > 0:
                self._refill()
                done, _ = await asyncio.wait(self._pending, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda task: self._pending[task][0][0].group_index):
                    group, wave = self._pending.pop(task)
                    self._settle(group, wave, task.result())
            await self._stop()
        finally:
            errors = await self._cancel_pending()
        if errors:
            raise errors[0]
        self._surplus.sort(key=lambda group: group[0].group_index)
        self._data_source.add_groups(self._surplus)
        self.tally.surplus_groups = len(self._surplus)
        return sorted(self._kept, key=lambda group: group[0].group_index)

    def _num_missing(self) -> int:
        return self._args.rollout_batch_size - len(self._kept)

    def _refill(self) -> None:
        """Another wave where what is in flight cannot fill the batch any more."""
        missing = self._num_missing() - len(self._pending)
        if missing <= 0:
            return
        whole_wave = not self._waves or self._args.refill_granularity == "batch"
        groups = self._data_source.get_groups(self._wave_size if whole_wave else missing, rollout_id=self._rollout_id)
        if len(groups) < missing:
            raise ValueError(
                f"--data-source-path {self._args.data_source_path}: get_groups gave {len(groups)} groups for rollout "
                f"{self._rollout_id}, which lacks {missing}; a data source has to give as many as it is asked for"
            )
        for group in groups:
            for sample in group:
                sample.metadata.setdefault("start_rollout_id", self._rollout_id)
            if not self._waves or self._waves[-1].drawn == self._wave_size:
                self._waves.append(_Wave())
            self._waves[-1].drawn += 1
            self._pending[asyncio.create_task(self._run_group(group))] = (group, self._waves[-1])

    async def _run_group(self, group: list[Sample]) -> list[Sample]:
        samples = await gather_or_cancel(self._run_sample(sample) for sample in group)
        aborted = any(sample.status is Status.ABORTED for sample in samples)
        if self._context.rewards.by_group and not aborted and not self._stopping:
            with self.intervals.judging():
                await self._context.rewards.judge_group(samples)
        return samples

    async def _run_sample(self, sample: Sample) -> Sample:
        """Generate one sample, and judge it unless the generate function has; its status tells what became of it.

        Under --group-rm it is judged with its group.
        """
        async with self._slots:
            if self._stopping:
                sample.status = Status.ABORTED
                return sample
            seed = sampling_seed(self._args.rollout_seed, self._rollout_id, sample.index)
            with self.intervals.generating():
                try:
                    sample = await self._generate(
                        self._args, sample, replace(self._params, sampling_seed=seed), self._context
                    )
                except EngineError as error:
                    self._last_error = error
                    return sample.to_failed(f"generation failed: {error}")
        self.tally.tokens += sample.response_length
        unjudged = _is_finished(sample) and sample.reward is None and not self._context.rewards.by_group
        if unjudged and not self._stopping:
            with self.intervals.judging():
                verdict = await self._context.rewards.judge(sample)
            verdict.apply(sample)
        return sample

    def _settle(self, drawn: list[Sample], wave: _Wave, samples: list[Sample]) -> None:
        """Keep the group, drop it, or set it aside."""
        if self._num_missing() <= 0:
            self._surplus.append(_bare(drawn))
            return
        self._count_failures(samples)
        reason = self._drop_reason(samples)
        wave.settled += 1
        if reason is None:
            self._kept.append(samples)
            wave.kept += 1
            self._empty_waves = 0
            return
        if reason == "aborted":
            self._surplus.append(_bare(drawn))
        self.tally.dropped_groups[reason] += 1
        wave.failed += reason == "generation_failed"
        self._check_progress(wave)

    def _drop_reason(self, samples: list[Sample]) -> str | None:
        """Why the group cannot be kept; None where it is."""
        if any(sample.status is Status.ABORTED for sample in samples):
            return "aborted"
        judged = [sample for sample in samples if sample.reward is not None]
        for sample in judged:
            sample.reward_value(self._args.reward_key)  # a --reward-key that does not fit ends the run here
        if all(sample.status is Status.FAILED and not sample.response_length for sample in samples) and not judged:
            return "generation_failed"
        if len(judged) < (1 if self._args.advantage_estimator in _NO_GROUP_BASELINE else 2):
            return "too_few_rewards"
        return None if self._filter is None else self._filter(judged)

    def _count_failures(self, samples: list[Sample]) -> None:
        for sample in samples:
            if sample.status is not Status.FAILED or sample.reward_failure is None:
                continue
            kind = failure_kind(sample.reward_failure)
            if kind not in self.tally.failed_rewards:
                logger.warning("rollout %d, sample %d: %s", self._rollout_id, sample.index, sample.reward_failure)
            self.tally.failed_rewards[kind] += 1

    def _check_progress(self, wave: _Wave) -> None:
        """Raise where a wave shows that there is no point in going on. Groups that fail end first: wait for all."""
        if wave.settled < self._wave_size or wave.kept:
            return
        if wave.failed == self._wave_size:
            raise RuntimeError(
                f"rollout {self._rollout_id}: generation failed for all of {wave.failed} groups, the last time with: "
                f"{self._last_error}; the engines' logs say why"
            ) from self._last_error
        self._empty_waves += 1
        limit = self._args.max_empty_waves
        if self._empty_waves == limit:
            reasons = ", ".join(f"{count} by {reason}" for reason, count in self.tally.dropped_groups.items())
            raise RuntimeError(
                f"rollout {self._rollout_id}: nothing was kept in {limit} waves of {self._wave_size} prompts "
                f"(--max-empty-waves {limit}); dropped: {reasons}; prompts that are sometimes right and sometimes "
                "wrong, a higher --rollout-temperature or more --n-samples-per-prompt give groups to keep"
            )

    async def _stop(self) -> None:
        """Enough is kept: abort what is in flight, and set its prompts aside."""
        self._stopping = True
        try:
            async with asyncio.timeout(_ABORT_TIMEOUT):
                while self.intervals.requests_in_flight:
                    await self._context.engines.abort_all()
                    again = time.monotonic() + _ABORT_INTERVAL
                    while self.intervals.requests_in_flight and time.monotonic() < again:
                        await asyncio.sleep(0.005)
        except TimeoutError as error:
            raise RuntimeError(
                f"rollout {self._rollout_id}: {self.intervals.requests_in_flight} requests are still running "
                f"{_ABORT_TIMEOUT:g} s after the engines were told to abort them; the engines' logs say why"
            ) from error
        self._surplus.extend(_bare(group) for group, _ in self._pending.values())

    async def _cancel_pending(self) -> list[Exception]:
        """End the tasks (after `_stop` they wait for nothing but rewards); returns what went wrong in them."""
        for task in self._pending:
            task.cancel()
        results = await asyncio.gather(*self._pending, return_exceptions=True)
        self._pending.clear()
        return [result for result in results if isinstance(result, Exception)]


def _is_finished(sample: Sample) -> bool:
    return sample.status in (Status.COMPLETED, Status.TRUNCATED)


def _bare(group: list[Sample]) -> list[Sample]:
    return [sample.to_bare_prompt() for sample in group]


def _load_filter(args: Args) -> Callable[[list[Sample]], str | None] | None:
    """--dynamic-sampling-filter-path as a function to the reason for dropping a group, None where it stays.

    A filter is shown the group's samples that have a reward, so that it can compute with `sample.reward`.
    """
    path = args.dynamic_sampling_filter_path
    if path is None:
        return None
    function = load_hook("dynamic_sampling_filter_path", path)

    def drop_reason(samples: list[Sample]) -> str | None:
        verdict = function(args, samples)
        if bool(verdict.keep if hasattr(verdict, "keep") else verdict):
            return None
        reason = verdict.reason if hasattr(verdict, "reason") else None
        return str(reason or path.rpartition(".")[2]).replace(" ", "_").replace("/", "_")

    return drop_reason


def _post_process(args: Args, samples: list[Sample]) -> None:
    """--rollout-sample-filter-path and --custom-reward-post-process-path, in place."""
    if args.rollout_sample_filter_path is not None:
        for sample in samples:
            if sample.loss_mask is None:
                sample.loss_mask = [1] * sample.response_length
        load_hook("rollout_sample_filter_path", args.rollout_sample_filter_path)(args, samples)
        for sample in samples:
            sample.check()
    path = args.custom_reward_post_process_path
    if path is not None:
        rewards = list(load_hook("custom_reward_post_process_path", path)(args, samples))
        if len(rewards) != len(samples):
            raise ValueError(
                f"--custom-reward-post-process-path {path}: it returned {len(rewards)} rewards for {len(samples)} "
                "samples; it has to return one each"
            )
        for sample, reward in zip(samples, rewards, strict=True):
            if sample.reward is not None:
                sample.metadata["raw_reward"] = sample.reward
                sample.reward = float(reward) if args.reward_key is None else {args.reward_key: float(reward)}
