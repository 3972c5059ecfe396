"""A real run as input: its lengths from samples.jsonl or a dump, its speeds from metrics.jsonl.

- Used by: `report`.
- Invariant: the recorded run is simulated with its own flags (args.yaml), and speeds are scaled until the simulation
  takes as long as the run did. So what the model of an engine leaves out is in its speed, not in the result.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from slime.config.args import Args
from slime.config.flags.table import spellings
from slime.config.problem import Problem, UsageError
from slime.config.values import from_yaml
from slime.config.yaml_files import read_yaml_file
from slime.core.verbs import Story
from slime.observability.metrics_log import read_metrics
from slime.observability.samples_file import SAMPLES, TRAIN, read_samples
from slime.rollout.dump import read_dump
from slime.simulate.lengths import Lengths, LogNormal, Recorded, RecordedGroup
from slime.simulate.loop import run_story
from slime.simulate.speeds import Speeds, unmeasured

RUN, SAMPLES_FLAG = "--simulate-run", "--simulate-samples"
LEAST_ROLLOUTS = 8
"""The rollouts of the simulation that the recorded run is compared with."""


def _refuse(where: str, value: str, rule: str, remedy: str) -> UsageError:
    return UsageError([Problem(severity="error", where=where, value=value, rule=rule, remedy=remedy)])


@dataclass(frozen=True)
class RealRun:
    """The numbers that a simulation takes from a real run."""

    path: Path
    args: Args
    """The run's own flags, with the architecture of the plan."""
    means: Mapping[str, float]
    """The mean of each number of metrics.jsonl over the rollouts taken; the first does not count, if there are more."""
    rollouts: int
    groups: list[RecordedGroup]

    @property
    def drop_rate(self) -> float:
        """Return the share of groups that the dynamic filter dropped."""
        dropped = sum(mean for name, mean in self.means.items() if name.startswith("rollout/groups_dropped/"))
        return dropped / (dropped + self.args.rollout_batch_size)

    def lengths(self, longest: int) -> Lengths:
        return Recorded(self.groups, longest=longest)


def read_run(args: Args) -> RealRun | None:
    """Return the run of --simulate-run, or None without one.

    Raises:
        UsageError: a file of it is missing or cannot be read, or no rollout was trained on.
    """
    if args.simulate_run is None:
        return None
    path, most = Path(args.simulate_run), args.simulate_run_rollouts
    for name in ("args.yaml", "metrics.jsonl"):
        if not (path / name).is_file():
            remedy = "name the directory that a run wrote (--save, or --log-dir)"
            raise _refuse(RUN, str(path), f"there is no {name} in it", remedy)
    try:
        events = read_metrics(path / "metrics.jsonl")
        own = _own_args(path / "args.yaml", args)
        groups = groups_of_samples(path / SAMPLES, most) if (path / SAMPLES).is_file() else []
    except (OSError, ValueError) as error:
        raise _refuse(RUN, str(path), str(error), "name another run, or repair the file") from error
    steps = _steps(events, most)
    if not steps:
        raise _refuse(RUN, str(path), "metrics.jsonl has no trained rollout with times", "name a run that has trained")
    ahead = int(any("time/rollout_waited" in step for step in steps))
    # The first one starts the reward workers, and an asynchronous loop waits for it. After the last one an asynchronous
    # loop generates nothing.
    end = _last(own, steps) if ahead else float("inf")
    counted = [step for step in steps if 1 < step["step"] < end] or steps
    names = {name for step in counted for name in step}
    means = {name: statistics.fmean(step.get(name, 0.0) for step in counted) for name in names}
    return RealRun(path, replace(own, rollouts_ahead=ahead), means, len(counted), groups)


def _last(args: Args, steps: Sequence[Mapping[str, float]]) -> float:
    """Return the step of the run's last rollout, or one after `steps` if the run did not get there."""
    return float(args.num_rollout or steps[-1]["step"] + 1)


def _steps(events: Sequence[Mapping[str, float]], most: int | None) -> list[dict[str, float]]:
    """Return one record for each trained step that has times."""
    steps: dict[int, dict[str, float]] = {}
    for event in events:
        steps.setdefault(int(event["step"]), {}).update(event)
    trained = [step for number, step in sorted(steps.items()) if number and "time/step" in step]
    return [step for step in trained if most is None or step["step"] <= most]


def _own_args(path: Path, args: Args) -> Args:
    """Return `args` with all of slime's flags as the file has them. Raises ValueError."""
    data = read_yaml_file(str(path))
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a mapping of flags")
    known = spellings()
    values: dict[str, Any] = {}
    for name, value in cast(dict[str, Any], data).items():
        spec = known.get(f"--{name.replace('_', '-')}", (None, True))[0]
        if spec is not None and spec.source == "slime":
            values[spec.name] = from_yaml(spec, value)
    return replace(args, **values)


def groups_of_samples(path: Path, most: int | None = None) -> list[RecordedGroup]:
    """Return the groups of training samples in a samples.jsonl, of at most `most` rollouts.

    Raises:
        ValueError: a row has no lengths, or no row is a training sample.
    """
    found: dict[tuple[int, int], tuple[int, list[int]]] = {}
    for row in read_samples(path):
        if row["split"] != TRAIN or (most is not None and row["step"] > most):
            continue
        try:
            key = (int(row["step"]), int(row["group"]))
            found.setdefault(key, (int(row["prompt_tokens"]), []))[1].append(int(row["response_tokens"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: a row has no {error} as a number") from error
    if not found:
        raise ValueError(f"{path}: there are no training samples in it")
    return [RecordedGroup(prompt, tuple(responses)) for prompt, responses in found.values()]


def groups_of_file(path: Path) -> list[RecordedGroup]:
    """Return the groups of --simulate-samples: a samples.jsonl, or a dump.

    Raises:
        UsageError: it cannot be read, or is neither.
    """
    readers: tuple[Callable[[Path], list[RecordedGroup]], ...] = (groups_of_samples, _groups_of_dump)
    faults: list[str] = []
    for read in readers:
        try:
            return read(path)
        except (OSError, ValueError) as error:
            faults.append(str(error))
    remedy = "name a samples.jsonl of a run, or a dump of --save-debug-rollout-data"
    rule = f"not a samples.jsonl ({faults[0]})" if path.is_file() else "no such file"
    raise _refuse(SAMPLES_FLAG, str(path), rule, remedy)


def _groups_of_dump(path: Path) -> list[RecordedGroup]:
    groups = [
        RecordedGroup(group[0].prompt_length, tuple(sample.response_length for sample in group))
        for group in read_dump(path)
    ]
    if not groups:
        raise ValueError(f"{path}: it is empty")
    return groups


def lengths_of(args: Args, run: RealRun | None) -> tuple[Lengths, str]:
    """Return the response lengths and their source: --simulate-lengths, --simulate-samples or --simulate-run.

    Raises:
        UsageError: none of them is given, or it cannot be used.
    """
    longest = args.rollout_max_response_len
    if args.simulate_lengths:
        mean, p99 = args.simulate_lengths
        drawn = LogNormal(mean, p99, longest, args.simulate_prompt_length)
        try:
            _ = drawn.sigma
        except ValueError as error:
            rule = f"no log-normal distribution has them; it needs {error}"
            raise _refuse(
                "--simulate-lengths", f"{mean:g} {p99:g}", rule, "give the mean, then the percentile"
            ) from error
        return drawn, "--simulate-lengths, log-normal"
    if args.simulate_samples is not None:
        return Recorded(groups_of_file(Path(args.simulate_samples)), longest=longest), SAMPLES_FLAG
    if run is not None and run.groups:
        return run.lengths(longest), f"{RUN}, {sum(len(group.responses) for group in run.groups):,} samples"
    remedy = f"give the mean and the 99th percentile, or {SAMPLES_FLAG} or {RUN} with recorded ones"
    raise _refuse("--simulate-lengths", "(not given)", "nothing is known of the lengths of responses", remedy)


def measured(run: RealRun, stories: Mapping[int, Story], lengths: Lengths) -> Speeds:
    """Return the speeds with which a simulation of the recorded run takes as long as the run did.

    `stories` has the loops by the number of rollouts ahead.
    """
    args, means = run.args, run.means
    speeds = unmeasured(args, lengths)
    source = f"{RUN}, mean of {run.rollouts} rollouts"
    reward = 0.0 if args.rollouts_ahead else means["time/reward"]
    rest = {
        "sync": means["time/weight_sync"],
        "save": means["time/checkpoint"],
        "offload": means["time/offload"],
        "overhead": means["time/idle"],
        "reward": reward,
    }
    steps = run_story(stories[args.rollouts_ahead], args, speeds, lengths, num_rollouts=LEAST_ROLLOUTS)
    if args.rollouts_ahead:  # generation and training overlap, so the phase is only what the loop waited
        steps = steps[1:-1]
        ours = statistics.fmean(step.metrics["time/rollout"] for step in steps)
        factor = means["time/rollout"] / ours
    else:
        factor = means["time/generation"] / statistics.fmean(step.times["time/generation"] for step in steps)
    training = means["time/training"] / statistics.fmean(step.times["time/training"] for step in steps)
    speeds = speeds.known(source, engine=speeds.engine.scaled(factor), train_flops=speeds.train_flops / training)
    return speeds.known(source, **rest)
