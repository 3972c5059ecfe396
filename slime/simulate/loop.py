"""SimulatedCluster: the verbs of the training loop on a virtual clock.

- Used by: `study` runs the loops of train.py and train_async.py with it, unchanged.
- Invariant: in every second of the run, each engine and each rank of the trainers is either busy or idle, and
  `GpuTimes` accounts for all of them. A sample is trained on once.

A verb that takes time runs the event loop for that long, so that a rollout ahead goes on while the loop trains:

    generate_ahead(0)   loop runs until rollout 0 is whole
    train(0)            loop runs for the seconds of the training, in which rollout 1 is generated
    sync_weights()      drain: loop runs until rollout 1 is whole; then for the seconds of the sync
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from slime.config.args import Args
from slime.core.verbs import Story
from slime.observability.phases import StepClock
from slime.rollout.ahead import OneAhead
from slime.rollout.context import RolloutResult
from slime.simulate.clock import VirtualLoop
from slime.simulate.engines import TimedEngines
from slime.simulate.lengths import Lengths
from slime.simulate.rollouts import Rollouts, grain_of, simulated_args
from slime.simulate.speeds import Speeds
from slime.simulate.trainers import TimedTrainers


@dataclass(frozen=True)
class GpuTimes:
    """The seconds of engines and of trainers' ranks until now, each summed over them."""

    wall: float = 0.0
    engine_busy: float = 0.0
    engine_idle: float = 0.0
    request_seconds: float = 0.0
    rank_busy: float = 0.0
    rank_idle: float = 0.0

    def since(self, before: GpuTimes) -> GpuTimes:
        """Return the times between `before` and now."""
        return GpuTimes(*(vars(self)[name] - vars(before)[name] for name in vars(self)))


@dataclass
class Step:
    """One simulated step; times in seconds, lengths in tokens."""

    times: dict[str, float]
    metrics: dict[str, float]
    generated: int
    """Response tokens generated in the step."""
    trained: int
    """Tokens of prompt and response that were trained on."""
    old: float
    """The share of the trained response tokens that older weights sampled."""
    gpus: GpuTimes
    samples: list[int] = field(default_factory=list[int])
    """The numbers of the samples that were trained on."""
    lengths: list[int] = field(default_factory=list[int])
    """The tokens of prompt and response of each."""


class SimulatedCluster:
    """The verbs of `core.verbs`, for `num_rollouts` rollouts; close it at the end."""

    def __init__(self, args: Args, speeds: Speeds, lengths: Lengths, *, num_rollouts: int) -> None:
        """`args` are the run's own, with lengths in tokens."""
        grain = grain_of(args)
        self._args = args
        self._speeds = speeds
        self._loop = VirtualLoop()
        self._engines = TimedEngines(self._loop, args.num_engines, speeds.engine, speeds.running_limit, lengths, grain)
        self._rollouts = Rollouts(simulated_args(args, grain), self._engines, grain, reward_seconds=speeds.reward)
        self._trainers = TimedTrainers(args, speeds.train_flops)
        self._num_rollouts = num_rollouts
        self._ahead = OneAhead(self._begin, args, last=num_rollouts)
        self._clock = StepClock(self._loop.time)
        self._version = 0
        self._rank_busy = self._rank_idle = 0.0
        self._accounted = 0.0
        self._metrics: dict[str, float] = {}
        self._trained = 0
        self._old = 0.0
        self._samples: list[int] = []
        self._lengths: list[int] = []
        self.steps: list[Step] = []

    def close(self) -> None:
        """End the rollout in flight, if there is one, and the event loop."""
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def times(self) -> GpuTimes:
        """Return the seconds of all engines and ranks until now."""
        self._wait_trainers()
        each = [engine.settle() for engine in self._engines.engines]
        return GpuTimes(
            wall=self._loop.time(),
            engine_busy=sum(times.busy for times in each),
            engine_idle=sum(times.idle for times in each),
            request_seconds=sum(times.request_seconds for times in each),
            rank_busy=self._rank_busy,
            rank_idle=self._rank_idle,
        )

    # ---- the verbs

    def rollouts(self) -> Iterator[int]:
        """Yield the ids of the rollouts, and record a step after each."""
        for rollout_id in range(self._num_rollouts):
            self._clock = StepClock(self._loop.time)
            before, tokens = self.times(), self._engines.tokens
            yield rollout_id
            self._pass("idle", self._speeds.overhead)
            times = self._clock.close()
            self.steps.append(
                Step(
                    times=times,
                    metrics=self._metrics,
                    generated=self._engines.tokens - tokens,
                    trained=self._trained,
                    old=self._old,
                    gpus=self.times().since(before),
                    samples=self._samples,
                    lengths=self._lengths,
                )
            )

    def generate(self, rollout_id: int) -> list[int]:
        """Return the lengths of a rollout that is generated now."""
        with self._clock.inner() as seconds:
            result = self._loop.run_until_complete(self._begin(rollout_id))
            seconds["generation"] = result.metrics["time/generation"]
            seconds["reward"] = result.metrics["time/reward"]
        return self._take(result)

    def generate_ahead(self, rollout_id: int) -> list[int]:
        """Wait for a rollout, begin the next one, and return the lengths of the first."""
        task = self._ahead.take(rollout_id)
        self._wait_for(task)
        self._ahead.follow(rollout_id)
        return self._take(task.result())

    @contextmanager
    def engines_asleep(self) -> Iterator[None]:
        """Pass the seconds of the exchange of memory, if engines and trainers share devices."""
        if self._args.colocate and self._args.offload:
            self._pass("offload", self._speeds.offload)
        yield

    def train(self, rollout_id: int, parts: list[int]) -> None:
        """Pass the seconds of the training, in which each rank is busy for its own share."""
        self._wait_trainers()
        training = self._trainers.train(parts)
        self._pass("training", training.seconds)
        self._rank_busy += sum(training.busy)
        self._rank_idle += sum(training.seconds - busy for busy in training.busy)
        self._accounted = self._loop.time()
        self._trained = training.tokens

    def save_if_due(self, rollout_id: int) -> None:
        """Pass the seconds of a checkpoint every --save-interval rollouts."""
        interval = self._args.save_interval
        if interval and (rollout_id + 1) % interval == 0:
            if self._ahead.settled is not None:
                self._wait_for(self._ahead.settled)
            self._pass("checkpoint", self._speeds.save)

    def sync_weights(self) -> None:
        """Wait for requests as --update-weight-pause says, and pass the seconds of the sync."""
        self._version += 1
        if self._ahead.drained is not None:
            self._wait_for(self._ahead.drained)
        self._engines.pause_all()
        self._loop.run_until_complete(self._engines.abort_all())
        self._pass("weight_sync", self._speeds.sync)
        self._rollouts.context.policy_version = self._version
        self._engines.resume_all(self._version)

    def evaluate_before_first(self) -> None:
        """Do nothing: evaluations are not simulated."""

    def evaluate_if_due(self, rollout_id: int) -> None:
        """Do nothing: evaluations are not simulated."""

    # ---- time

    def _begin(self, rollout_id: int) -> asyncio.Task[RolloutResult]:
        return self._loop.create_task(self._rollouts.make(rollout_id))

    def _wait_for(self, task: asyncio.Task[RolloutResult]) -> None:
        with self._clock.phase("generation"):
            self._loop.run_until_complete(asyncio.wait([task]))

    def _take(self, result: RolloutResult) -> list[int]:
        self._metrics = result.metrics
        samples = [sample for group in result.groups for sample in group]
        self._samples = [sample.index for sample in samples]
        versions = [row for sample in samples if (row := sample.array("policy_versions")) is not None]
        self._old = sum(int((row < self._version).sum()) for row in versions) / sum(map(len, versions))
        self._lengths = self._rollouts.lengths(result)
        return self._lengths

    def _pass(self, phase: str, seconds: float) -> None:
        """Let `seconds` pass, as this phase; `idle` is the time of no phase."""
        if seconds <= 0:
            return
        if phase == "idle":
            self._loop.run_until_complete(asyncio.sleep(seconds))
            return
        with self._clock.phase(phase):
            self._loop.run_until_complete(asyncio.sleep(seconds))

    def _wait_trainers(self) -> None:
        """Account for the time since the last training, in which all ranks were idle."""
        now = self._loop.time()
        self._rank_idle += (now - self._accounted) * self._trainers.ranks
        self._accounted = now


def run_story(story: Story, args: Args, speeds: Speeds, lengths: Lengths, *, num_rollouts: int) -> list[Step]:
    """Run a training loop on the virtual clock, and return its steps."""
    cluster = SimulatedCluster(args, speeds, lengths, num_rollouts=num_rollouts)
    try:
        story(cluster)
    finally:
        cluster.close()
    return cluster.steps
