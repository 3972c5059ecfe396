"""Run one group from prompt to judged responses, within one rollout or over several.

- Called by: `collect` draws groups, and a GroupRunner runs each as a task. The samples of a group are generated
  concurrently. Each is judged when it finishes; with --group-rm the group is judged when all have finished.
- Invariant: the samples as drawn are never changed, because the work is done on copies. Only a finished copy replaces
  its sample in the list that the data source handed out, where `in_flight` sees it. A sample that has a response or a
  reward does not get a second one.

    drawn --copy--> generate <--(aborted by a weight update: continues)--> generate --+-> finished -> judge
                       +-- the rollout stops, or --partial-rollout-max-tokens is reached: ABORTED, with its tokens
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from slime.config.args import Args
from slime.core.about import about
from slime.core.awake import awake_timeout
from slime.core.failure_log import FailureLog
from slime.core.plugins import HookFailed
from slime.core.sample import Sample, Status
from slime.engine.client import EngineError
from slime.engine.protocol import SamplingParams
from slime.rollout.context import RolloutContext, gather_or_cancel
from slime.rollout.generate import Generate, load_generate, rollout_sampling_params, room, sampling_seed
from slime.rollout.intervals import PhaseIntervals
from slime.rollout.reward_pool.verdict import check_own_reward
from slime.rollout.sample_failures import ENGINE_FAILED, HOOK_FAILED
from slime.rollout.waves import Wave

logger = logging.getLogger(__name__)
_ABORT_TIMEOUT = 60.0
"""Seconds that engines have to end all requests after an abort, on top of the time that it takes to find a hung one."""
_ABORT_INTERVAL = 0.25
"""Seconds between two aborts: an abort misses a request that is still on its way through the router."""
_MAX_FRUITLESS = 100
"""The most requests in a row of one sample that are aborted without a token; then its generation has failed."""
_FRUITLESS_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
"""Seconds before the next request, doubled after each fruitless one: a weight update may take its time."""


class GroupRun:
    """A group at work in this rollout."""

    def __init__(self, group: list[Sample], wave: Wave, rollout_id: int, *, restart: bool = False) -> None:
        """`group` is the list that the data source handed out; `restart` begins again from the bare prompts."""
        self._handed_out = group
        self._drawn = list(group)
        self.wave = wave
        self.samples = [sample.to_bare_prompt() if restart else sample.copy() for sample in group]
        """The copies that the work is done on."""
        started = [sample.metadata.get("start_rollout_id") for sample in self.samples]
        self._start_rollout_id = next((start for start in started if start is not None), rollout_id)
        for sample in self.samples:
            sample.metadata["start_rollout_id"] = self._start_rollout_id
        self._tokens = 0

    @property
    def index(self) -> int:
        return self._drawn[0].group_index

    @property
    def is_cut_off(self) -> bool:
        """Whether a sample has to continue later."""
        return any(sample.status is Status.ABORTED for sample in self.samples)

    def put(self, place: int, sample: Sample, num_tokens: int) -> None:
        """Record that a request ended with `num_tokens` tokens; a generate function may have made a new Sample."""
        sample.metadata.setdefault("start_rollout_id", self._start_rollout_id)
        self.samples[place] = sample
        self._tokens += max(0, num_tokens)

    def fail(self, place: int, reason: str) -> None:
        """Record that a sample failed; it is made from the sample as drawn, whatever a hook did to the copy."""
        self.put(place, self._drawn[place].copy().to_failed(reason), 0)

    def publish(self, place: int) -> None:
        """Show the finished sample to everyone who looks at the groups in flight."""
        self._handed_out[place] = self.samples[place]

    @property
    def num_tokens(self) -> int:
        """The number of response tokens that `take_num_tokens` would return."""
        return self._tokens

    def take_num_tokens(self) -> int:
        """Return the number of response tokens generated since the last call."""
        count, self._tokens = self._tokens, 0
        return count

    def mark(self) -> None:
        """Make the present state the one that `as_drawn` returns from now on."""
        self._drawn = [sample.copy() for sample in self.with_tokens()]

    def as_drawn(self) -> list[Sample]:
        return list(self._drawn)

    def as_bare_prompts(self) -> list[Sample]:
        return [sample.to_bare_prompt() for sample in self._drawn]

    def with_tokens(self) -> list[Sample]:
        """Return the samples with all that was generated and judged, or bare prompts if nothing was."""
        if not any(map(has_begun, self.samples)):
            return self.as_bare_prompts()
        return [sample if has_begun(sample) else self._not_begun(sample) for sample in self.samples]

    def _not_begun(self, sample: Sample) -> Sample:
        """Return the bare prompt; it starts in a later rollout with the seed of its group."""
        bare = sample.to_bare_prompt()
        bare.metadata["start_rollout_id"] = self._start_rollout_id
        return bare


def _is_broken(sample: Sample) -> bool:
    """Return whether a hook has left the sample with fields that contradict each other."""
    try:
        sample.check()
    except ValueError:
        return True
    return False


def has_begun(sample: Sample) -> bool:
    return sample.response_length > 0 or sample.reward is not None


class GroupRunner:
    """Runs the groups of one rollout; `slots` limits the requests in flight."""

    def __init__(self, args: Args, context: RolloutContext, slots: asyncio.Semaphore, rollout_id: int) -> None:
        self._args = args
        self._context = context
        self._rollout_id = rollout_id
        self._slots = slots
        self._generate: Generate = load_generate(args)
        self._params = rollout_sampling_params(args)
        self._stopping = False
        self._idle = asyncio.Event()
        self.intervals = PhaseIntervals(asyncio.get_running_loop().time)
        self.last_error: EngineError | HookFailed | None = None
        self._failures = FailureLog(logger)

    async def run(self, group: GroupRun) -> None:
        """Run the group until every sample has ended or is cut off, or until the rollout stops."""
        await gather_or_cancel(self._run_sample(group, place) for place in range(len(group.samples)))
        if self._context.rewards.by_group and not group.is_cut_off and not self._stopping:
            with self.intervals.judging():
                await self._context.rewards.judge_group(group.samples)

    async def _run_sample(self, group: GroupRun, place: int) -> None:
        """Generate one sample, and judge it unless its generate function did; the result is in its status."""
        if group.samples[place].status in (Status.PENDING, Status.ABORTED):
            async with self._slots:
                if self._stopping:
                    group.samples[place].status = Status.ABORTED
                    return
                await self._generate_sample(group, place)
            check_own_reward(group.samples[place], self._args.reward_key)
        sample = group.samples[place]
        if sample.is_finished:
            group.publish(place)
        unjudged = sample.is_finished and sample.reward is None and not self._context.rewards.by_group
        if unjudged and not self._stopping:
            with self.intervals.judging():
                verdict = await self._context.rewards.judge(sample)
            verdict.apply(sample)

    async def _generate_sample(self, group: GroupRun, place: int) -> None:
        """Send requests until the sample ends; an abort before the rollout stops comes from a weight update."""
        params = self._params_of(group.samples[place])
        fruitless = 0
        while not self._stopping:
            sample = group.samples[place]
            before, status = sample.response_length, sample.status
            kept = sample.copy() if self._args.custom_generate_function_path is not None else sample
            try:
                with self._request(), about(f"sample {sample.index}"):
                    sample = await self._generate(self._args, sample, params, self._context)
            except EngineError as error:
                self.last_error = error
                group.fail(place, f"{ENGINE_FAILED}: {error}")
                return
            except HookFailed as error:
                if not self._was_aborted(sample, status, before):
                    self.last_error = error
                    self._failures.add(f"rollout {self._rollout_id}, sample {sample.index}", error.__cause__ or error)
                    group.fail(place, f"{HOOK_FAILED}: {error}")
                    return
                sample = kept if _is_broken(sample) else sample
                sample.status = Status.ABORTED
            num_tokens = sample.response_length - before
            group.put(place, sample, num_tokens)
            if sample.status is not Status.ABORTED:
                if self._is_cut_off(sample, params.max_new_tokens):
                    sample.status = Status.ABORTED
                return
            fruitless = 0 if num_tokens else fruitless + 1
            if fruitless == _MAX_FRUITLESS:
                group.fail(place, f"{ENGINE_FAILED}: {fruitless} requests in a row were aborted without a token")
                return
            if fruitless:
                await asyncio.sleep(min(_LONGEST_PAUSE, _FRUITLESS_PAUSE * 2 ** (fruitless - 1)))

    def _was_aborted(self, sample: Sample, status: Status, before: int) -> bool:
        """Return whether a generate function failed because its request was aborted: it has only a part of its turn.

        `status` and `before`: status and length of the sample when the function was called.
        """
        newly = sample.status is Status.ABORTED and (status is not Status.ABORTED or sample.response_length > before)
        return self._stopping or newly

    def _params_of(self, sample: Sample) -> SamplingParams:
        """Return the sampling parameters, with the seed of the rollout in which the sample began.

        A draw depends on the seed and the position alone, so a response is the same in one part or in several.
        """
        start = sample.metadata["start_rollout_id"]
        params = replace(self._params, sampling_seed=sampling_seed(self._args.rollout_seed, start, sample.index))
        most = self._args.partial_rollout_max_tokens if self._args.partial_rollout else None
        if most is None:
            return params
        return replace(params, max_new_tokens=min(params.max_new_tokens, sample.num_sampled + most))

    def _is_cut_off(self, sample: Sample, limit: int) -> bool:
        """Return whether the sample ended at `limit` tokens and the response may be longer."""
        ended = sample.status is Status.TRUNCATED and sample.reward is None and sample.num_sampled >= limit
        return ended and room(self._args, sample, self._params.max_new_tokens) > 0

    @contextmanager
    def _request(self) -> Generator[None]:
        self._idle.clear()
        try:
            with self.intervals.generating():
                yield
        finally:
            if not self.intervals.requests_in_flight:
                self._idle.set()

    async def stop(self) -> None:
        """Send no more requests, abort those in flight, and wait until they have ended.

        Raises:
            RuntimeError: the engines do not end them.
        """
        self._stopping = True
        problem = "the engines' logs have the reason"
        limit = _ABORT_TIMEOUT + self._args.engine_health_timeout
        try:
            async with awake_timeout(limit):
                while self.intervals.requests_in_flight:
                    try:
                        await self._context.engines.abort_all()
                    except EngineError as error:  # its requests are sent to another engine, or fail
                        problem = str(error)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._idle.wait(), _ABORT_INTERVAL)
        except TimeoutError as error:
            raise RuntimeError(
                f"rollout {self._rollout_id}: {self.intervals.requests_in_flight} requests are still running "
                f"{limit:g} s after the engines were asked to abort them; {problem}"
            ) from error


def oldest_version(samples: Sequence[Sample]) -> int | None:
    """Return the earliest policy version that sampled a token of `samples`."""
    versions = [sample.array("policy_versions") for sample in samples]
    return min((int(row.min()) for row in versions if row is not None and len(row)), default=None)
