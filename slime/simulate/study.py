"""The runs that a simulation compares: the plan, other splits of its GPUs, and each of three techniques off and on.

- Used by: `report`.
- Invariant: all runs of a study have the same speeds and the same prompts, so they differ only in what a row names.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

from slime.config.args import Args
from slime.core.verbs import Story
from slime.simulate.lengths import Lengths
from slime.simulate.loop import GpuTimes, Step, run_story
from slime.simulate.speeds import Speeds

FACTOR = 1.5
"""The factor of over-sampling where a table switches it on."""
SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
"""The shares of the GPUs that train, in the table of splits."""
MOST_SAMPLES = 150_000
"""The samples that all runs of a study generate together: about a minute on one core."""
LEAST_ROLLOUTS, LEAST_ALIKE = 3, 2
"""The fewest rollouts of a run: one fills the pipeline, one counts, one empties it; and where all steps are alike."""


@dataclass(frozen=True)
class Outcome:
    """The measurements of a simulated run in its counted steps."""

    args: Args
    steps: list[Step]

    @property
    def seconds(self) -> float:
        """The mean seconds of a step."""
        return statistics.fmean(step.times["time/step"] for step in self.steps)

    def phase(self, name: str) -> float:
        """Return the mean seconds of a phase in a step."""
        return statistics.fmean(step.times[f"time/{name}"] for step in self.steps)

    @property
    def gpus(self) -> GpuTimes:
        """The times of all counted steps."""
        return GpuTimes(*(sum(vars(step.gpus)[name] for step in self.steps) for name in vars(GpuTimes())))

    @property
    def engines_idle(self) -> float:
        """The share of the engines' seconds in which no request runs."""
        times = self.gpus
        return times.engine_idle / (times.engine_busy + times.engine_idle)

    @property
    def trainers_idle(self) -> float:
        """The share of the ranks' seconds in which they do not compute."""
        times = self.gpus
        return times.rank_idle / (times.rank_busy + times.rank_idle)

    @property
    def running(self) -> float:
        """The mean number of running requests of an engine that is busy."""
        times = self.gpus
        return times.request_seconds / times.engine_busy if times.engine_busy else 0.0

    @property
    def trained_per_second(self) -> float:
        """Tokens of prompt and response that are trained on in a second."""
        return sum(step.trained for step in self.steps) / sum(step.times["time/step"] for step in self.steps)

    @property
    def generated_per_second(self) -> float:
        """Response tokens generated in a second, also those that nobody trains on."""
        return sum(step.generated for step in self.steps) / sum(step.times["time/step"] for step in self.steps)

    @property
    def old_tokens(self) -> float:
        """The share of tokens that older weights sampled than those that are trained on."""
        return statistics.fmean(step.old for step in self.steps)

    @property
    def gpu_count(self) -> int:
        return gpus_of(self.args)


def gpus_of(args: Args) -> int:
    """Return the number of GPUs (or of processes on a CPU) of a plan."""
    return args.actor_world_size + (0 if args.colocate else args.rollout_num_gpus or 0)


def counted(args: Args, steps: list[Step]) -> list[Step]:
    """Return the steps of the steady state: a rollout ahead fills and empties a pipeline, leftovers fill the buffer."""
    if args.rollouts_ahead:
        return steps[1:-1]
    return steps[1:] if _fills(args) else steps


def _fills(args: Args) -> bool:
    """Return whether the first step of a run differs from the others."""
    surplus = (args.over_sampling_batch_size or 0) > args.rollout_batch_size
    return bool(args.rollouts_ahead) or args.partial_rollout or surplus


class Study:
    """All runs with the same speeds and lengths; `stories` has the loops by the number of rollouts ahead."""

    def __init__(self, args: Args, speeds: Speeds, lengths: Lengths, stories: Mapping[int, Story]) -> None:
        self._args = args
        self._speeds = speeds
        self._lengths = lengths
        self._stories = stories
        self._done: dict[tuple[Any, ...], Outcome] = {}
        per_rollout = args.rollout_batch_size * args.resolved.n_samples_per_prompt
        runs = len(splits(args, args.simulate_gpus or gpus_of(args))) + 4
        affordable = MOST_SAMPLES // (per_rollout * runs)
        self.rollouts = max(LEAST_ROLLOUTS, min(args.simulate_rollouts, affordable))
        """The rollouts of a run."""
        self._alike = max(LEAST_ALIKE, min(args.simulate_rollouts, affordable))
        """The rollouts of a run whose steps all count."""

    def run(self, args: Args) -> Outcome:
        """Run the loop of these Args, once for equal ones."""
        key = tuple(vars(args)[name] for name in _DIFFERENT)
        if key not in self._done:
            story = self._stories[args.rollouts_ahead]
            number = self.rollouts if _fills(args) else self._alike
            steps = run_story(story, args, self._speeds, self._lengths, num_rollouts=number)
            self._done[key] = Outcome(args, counted(args, steps))
        return self._done[key]

    def plan(self) -> Outcome:
        """Run the plan itself."""
        return self.run(self._args)

    def splits(self) -> list[Outcome]:
        """Run each split of the GPUs."""
        return [self.run(args) for args in splits(self._args, self._args.simulate_gpus or gpus_of(self._args))]

    def effects(self) -> Iterator[tuple[str, bool, Outcome, Outcome]]:
        """Yield each technique by name, whether the plan has it, and the runs without and with it."""
        args, size = self._args, self._args.rollout_batch_size
        now = args.over_sampling_batch_size or size
        wide = {"over_sampling_batch_size": now if now > size else round(FACTOR * size)}
        yield self._pair("over-sampling", now > size, {"over_sampling_batch_size": size}, wide)
        name = "partial rollout (over-sampled)"
        off, on = {**wide, "partial_rollout": False}, {**wide, "partial_rollout": True}
        yield self._pair(name, args.partial_rollout, off, on)
        if not args.colocate:
            off, on = {"rollouts_ahead": 0}, {"rollouts_ahead": 1}
            yield self._pair("one rollout ahead", bool(args.rollouts_ahead), off, on)

    def _pair(
        self, name: str, planned: bool, off: Mapping[str, Any], on: Mapping[str, Any]
    ) -> tuple[str, bool, Outcome, Outcome]:
        return name, planned, self.run(replace(self._args, **off)), self.run(replace(self._args, **on))


_DIFFERENT = (
    *("actor_num_nodes", "actor_num_gpus_per_node", "rollout_num_gpus", "colocate", "offload"),
    *("over_sampling_batch_size", "partial_rollout", "rollouts_ahead"),
)
"""The fields in which the runs of a study differ."""


def splits(args: Args, gpus: int) -> list[Args]:
    """Return the plan with `gpus` GPUs divided in several ways, and, for the synchronous loop, all of them shared.

    Training takes a multiple of TP x PP x CP, generation a multiple of an engine's GPUs. On one node of 8 GPUs with
    engines of 2 and TP 1, training takes 2, 4 or 6.
    """
    unit = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    engine = args.rollout_num_gpus_per_engine
    both = lcm(unit, engine)
    found: dict[int, Args] = {}
    for share in SHARES:
        train = max(both, round(gpus * share / both) * both)
        if train % unit == 0 and gpus - train > 0 and (gpus - train) >= engine:
            found[train] = _with_gpus(args, train, (gpus - train) // engine * engine)
    shared = gpus // both * both
    rows = list(found.values())
    if shared and not args.rollouts_ahead:
        whole = replace(_with_gpus(args, shared, shared), colocate=True, offload=True)
        rows.append(whole)
    return rows


def _with_gpus(args: Args, train: int, generate: int) -> Args:
    return replace(
        args, actor_num_nodes=1, actor_num_gpus_per_node=train, rollout_num_gpus=generate, colocate=False, offload=False
    )
