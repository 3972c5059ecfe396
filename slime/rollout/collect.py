"""The rollout loop: draw prompts, generate and judge the responses, and keep groups until a batch is full.

- Where it sits: it draws groups from the data source and runs each as a task (`group` generates and judges). When a
  task ends, `acceptance` keeps or drops its group. The kept groups go to `core.batch`.
- Invariant: every group that was drawn is kept, dropped for a counted reason, or given back to the data source. No
  group is lost, and none is in two places.

    get_groups -> run: generate -> judge -> settle -+-> kept (until --rollout-batch-size, then the rest is aborted)
         ^                                          +-> dropped (filter, failed generation or rewards), counted
         |                                          +-> cut off (--partial-rollout-max-tokens): continues later
         +---- surplus, aborted, cut off -----------+
               as bare prompts; with --partial-rollout with tokens and rewards; with --deterministic as drawn

Groups are settled in the order in which they end. With --deterministic they are settled in the order in which they were
started, so that neither what is kept nor what is given back depends on which group was faster.
"""

from __future__ import annotations

import asyncio
import logging
import time

from slime.config.args import Args
from slime.core.sample import Sample, Status
from slime.observability.progress import SampleProgress
from slime.rollout.acceptance import Acceptance, post_process
from slime.rollout.context import DataSource, RolloutContext, RolloutResult, request_slots
from slime.rollout.group import GroupRun, GroupRunner, has_begun, oldest_version
from slime.rollout.metrics import Tally, rollout_metrics
from slime.rollout.reward_pool.verdict import failure_kind
from slime.rollout.sample_failures import HOOK_FAILED, SampleFailures
from slime.rollout.waves import Waves

logger = logging.getLogger(__name__)


async def generate_rollout(
    args: Args, rollout_id: int, data_source: DataSource, context: RolloutContext
) -> RolloutResult:
    """Generate, judge and filter `--rollout-batch-size` groups.

    Raises:
        RuntimeError: nothing was kept in --max-empty-waves waves, every request of a wave failed, more rewards or
            generate functions failed than their limits allow, or the engines do not end aborted requests.
    """
    collector = _Collector(args, rollout_id, data_source, context, await request_slots(args, context))
    with context.progress.rollout(rollout_id, collector.progress):
        groups = await collector.run()
    metrics = rollout_metrics(args, groups, collector.tally, collector.intervals, context.policy_version)
    post_process(args, [sample for group in groups for sample in group])
    return RolloutResult(groups, metrics)


class _Collector:
    """The state of one rollout in progress."""

    def __init__(
        self, args: Args, rollout_id: int, data_source: DataSource, context: RolloutContext, slots: asyncio.Semaphore
    ) -> None:
        self._args = args
        self._rollout_id = rollout_id
        self._data_source = data_source
        self._context = context
        self._runner = GroupRunner(args, context, slots, rollout_id)
        self._acceptance = Acceptance(args)
        self._sample_failures = SampleFailures(args, rollout_id)
        self._waves = Waves(args, rollout_id)
        self._pending: dict[asyncio.Task[None], GroupRun] = {}
        """The running tasks, in the order in which they were started."""
        self._ended: asyncio.Queue[asyncio.Task[None]] = asyncio.Queue()
        self._kept: list[GroupRun] = []
        self._cut_off: list[GroupRun] = []
        self.tally = Tally()
        self.intervals = self._runner.intervals
        self._begin = time.monotonic()

    async def run(self) -> list[list[Sample]]:
        """Return the kept groups in order; by then, everything that was not needed is back in the data source."""
        try:
            while self._num_missing() > 0:
                self._refill()
                self._settle(await self._next_ended())
            await self._runner.stop()
        finally:
            errors = await self._cancel_pending()
        if errors:
            raise errors[0]
        self._give_back()
        # Copies: a drawn group is in flight until it has been trained on, and post-processing must not show there.
        return [[s.copy() for s in group.samples] for group in sorted(self._kept, key=lambda group: group.index)]

    def progress(self) -> SampleProgress:
        """Count the samples of the groups that are kept or may be; this only reads."""
        total = self._args.rollout_batch_size * self._args.resolved.n_samples_per_prompt
        samples = [s for group in (*self._kept, *self._pending.values()) for s in group.samples]
        ended = [s for s in samples if s.is_finished or s.status is Status.FAILED]
        judged = sum(s.reward is not None or s.reward_failure is not None for s in ended)
        return SampleProgress(
            total=total,
            generated=min(total, len(ended)),
            judged=min(total, judged),
            tokens=self.tally.tokens + sum(group.num_tokens for group in self._pending.values()),
            seconds=time.monotonic() - self._begin,
            dropped=self.tally.dropped_groups.total(),
        )

    def _num_missing(self) -> int:
        return self._args.rollout_batch_size - len(self._kept)

    # ---- drawing

    def _refill(self) -> None:
        """Start more groups if those in flight cannot fill the batch: first those cut off, then a new wave."""
        if self._num_missing() <= len(self._pending):
            return
        cut_off, self._cut_off = self._cut_off, []
        for group in cut_off:
            self._start(group)
        missing = self._num_missing() - len(self._pending)
        if missing <= 0:
            return
        whole_wave = not self._waves.begun or self._args.refill_granularity == "batch"
        groups = self._data_source.get_groups(self._waves.size if whole_wave else missing, rollout_id=self._rollout_id)
        if len(groups) < missing:
            raise ValueError(
                f"--data-source-path {self._args.data_source_path}: get_groups gave {len(groups)} groups for rollout "
                f"{self._rollout_id}, which lacks {missing}; a data source has to give as many as it is asked for"
            )
        for group in groups:
            restart = self._is_stale(group)
            self.tally.restarted_groups += restart
            self._start(GroupRun(group, self._waves.join(), self._rollout_id, restart=restart))

    def _is_stale(self, group: list[Sample]) -> bool:
        """Return whether a token is more than --max-staleness versions older than the weights that will be trained."""
        oldest = oldest_version(group)
        if self._args.max_staleness is None or oldest is None:
            return False
        return self._context.policy_version + self._args.rollouts_ahead - oldest > self._args.max_staleness

    def _start(self, group: GroupRun) -> None:
        task = asyncio.create_task(self._runner.run(group))
        task.add_done_callback(self._ended.put_nowait)
        self._pending[task] = group

    # ---- settling

    async def _next_ended(self) -> GroupRun:
        """Wait for the next group to settle."""
        if self._args.deterministic:
            task = next(iter(self._pending))
            await asyncio.wait([task])
        else:
            task = await self._ended.get()
        group = self._pending.pop(task)
        task.result()
        return group

    def _settle(self, group: GroupRun) -> None:
        """Keep the group, drop it, or set it aside to continue later."""
        self.tally.tokens += group.take_num_tokens()
        if group.is_cut_off:
            group.mark()
            self._cut_off.append(group)
            return
        self._sample_failures.count(group.samples)
        self._count_failures(group.samples)
        reason = self._acceptance.drop_reason(group.samples)
        if reason is None:
            self._kept.append(group)
            self._waves.kept(group.wave)
            return
        self.tally.dropped_groups[reason] += 1
        self._waves.dropped(group.wave, reason, self.tally.dropped_groups, self._runner.last_error)

    def _count_failures(self, samples: list[Sample]) -> None:
        for sample in samples:
            if sample.status is not Status.FAILED or sample.reward_failure is None:
                continue
            kind = failure_kind(sample.reward_failure)
            if kind == failure_kind(HOOK_FAILED):  # its traceback is logged when it fails
                self.tally.failed_generations += 1
                continue
            if kind not in self.tally.failed_rewards:
                logger.warning("rollout %d, sample %d: %s", self._rollout_id, sample.index, sample.reward_failure)
            self.tally.failed_rewards[kind] += 1

    # ---- the end

    async def _cancel_pending(self) -> list[Exception]:
        """Cancel the tasks and return their errors; after `stop` they wait for nothing but rewards."""
        for task in self._pending:
            task.cancel()
        results = await asyncio.gather(*self._pending, return_exceptions=True)
        return [result for result in results if isinstance(result, Exception)]

    def _give_back(self) -> None:
        """Give everything that was not needed back to the data source, in the order of group_index."""
        surplus = sorted([*self._pending.values(), *self._cut_off], key=lambda group: group.index)
        given_back = [self._leftover(group) for group in surplus]
        self._data_source.add_groups(given_back)
        self.tally.surplus_groups = len(given_back)
        self.tally.partial_groups = sum(any(map(has_begun, group)) for group in given_back)

    def _leftover(self, group: GroupRun) -> list[Sample]:
        if self._args.deterministic:
            return group.as_drawn()  # how far the group has come depends on the clock
        self.tally.tokens += group.take_num_tokens()
        return group.with_tokens() if self._args.partial_rollout else group.as_bare_prompts()
