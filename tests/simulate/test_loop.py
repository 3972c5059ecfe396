"""Whole simulated runs: every second is accounted for, no sample is trained on twice, and small cases by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from slime.cli.train import train
from slime.cli.train_async import train as train_async
from slime.config.args import Args
from slime.core.packing import training_flops
from slime.core.verbs import Story
from slime.simulate.lengths import LogNormal
from slime.simulate.loop import SimulatedCluster, Step, run_story
from slime.simulate.rollouts import MOST_UNITS
from slime.simulate.speeds import EngineSpeed, Speeds
from tests.simulate.plans_for_tests import ARCHITECTURE, plan_args

SPEEDS = Speeds(
    EngineSpeed(0.01, 0.002, 1e-4), train_flops=1e9, running_limit=6, sync=0.5, save=1.0, offload=0.25, overhead=0.1
)
VARIED = LogNormal(20.0, 60.0, 64, prompt_length=8)
EQUAL = LogNormal(10.0, 10.0, 64, prompt_length=8)
STORIES: dict[int, Story] = {0: train, 1: train_async}


def run(args: Args, speeds: Speeds = SPEEDS, lengths: LogNormal = VARIED, *, rollouts: int = 4) -> list[Step]:
    return run_story(STORIES[args.rollouts_ahead], args, speeds, lengths, num_rollouts=rollouts)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "over-sampling": {"over_sampling_batch_size": 7},
    "partial": {"over_sampling_batch_size": 7, "partial_rollout": True},
    "cut off": {"partial_rollout": True, "partial_rollout_max_tokens": 16},
    "filter": {"simulate_drop_rate": 0.4, "over_sampling_batch_size": 6},
    "filter by group": {"simulate_drop_rate": 0.4, "refill_granularity": "group"},
    "ahead": {"rollouts_ahead": 1},
    "ahead, abort": {"rollouts_ahead": 1, "update_weight_pause": "abort"},
    "ahead, stale": {
        "rollouts_ahead": 1, "over_sampling_batch_size": 9, "partial_rollout": True, "max_staleness": 1,
    },
    "deterministic": {"deterministic": True, "over_sampling_batch_size": 7},
    "three engines": {"rollout_num_gpus": 3, "actor_num_gpus_per_node": 2},
    "saves": {"rollouts_ahead": 1, "save_interval": 2},
    "shared": {"colocate": True, "offload": True},
}  # fmt: skip


def unaccounted(steps: list[Step], args: Args) -> float:
    """Return the largest share of a step's seconds in which an engine or a rank was neither busy nor idle."""
    worst = 0.0
    for step in steps:
        gpus, seconds = step.gpus, step.times["time/step"]
        engines = gpus.engine_busy + gpus.engine_idle - args.num_engines * seconds
        ranks = gpus.rank_busy + gpus.rank_idle - args.data_parallel_size * seconds
        phases = sum(value for name, value in step.times.items() if name != "time/step") - seconds
        worst = max(worst, *(abs(part) / seconds for part in (engines, ranks, phases, gpus.wall - seconds)))
    return worst


@pytest.mark.parametrize("name", SETTINGS)
def test_all_gpu_seconds_are_accounted_for(name: str) -> None:
    args = plan_args(**SETTINGS[name])
    steps = run(args)
    assert unaccounted(steps, args) < 1e-9
    assert unaccounted(steps, replace(args, rollout_num_gpus=args.num_engines + 1)) > 0.1  # control
    assert all(step.gpus.engine_busy > 0 for step in steps[:-1])


@pytest.mark.parametrize("name", SETTINGS)
def test_no_sample_is_trained_on_twice(name: str) -> None:
    args = plan_args(**SETTINGS[name])
    trained = Counter(sample for step in run(args) for sample in step.samples)
    assert set(trained.values()) == {1}
    assert len(trained) == 4 * 4 * 2


def test_a_synchronous_step_by_hand() -> None:
    """8 requests of 10 tokens, 6 and then 2 at a time; 8 samples of 8 + 10 tokens, twice forward for two steps."""
    args = plan_args()
    generation = 6 * 8 * 1e-4 + 10 * (0.01 + 6 * 0.002) + 2 * 8 * 1e-4 + 10 * (0.01 + 2 * 0.002)
    training = 8 * training_flops(ARCHITECTURE)(18) * 4 / 3 / 1e9
    for step in run(args, lengths=EQUAL):
        assert step.times["time/generation"] == pytest.approx(generation)
        assert step.times["time/training"] == pytest.approx(training)
        assert step.times["time/step"] == pytest.approx(generation + training + 0.5 + 0.1)
        assert step.gpus.rank_busy == pytest.approx(training)
        assert step.gpus.engine_busy == pytest.approx(generation)
        assert (step.generated, step.trained) == (80, 8 * 18)


def test_a_rollout_ahead_hides_the_shorter_side() -> None:
    args = plan_args()
    alone = run(args, lengths=EQUAL)[1].times
    for flops, name in ((1e9, "time/training"), (1e12, "time/generation")):
        speeds = replace(SPEEDS, train_flops=flops)
        alone = run(args, speeds, EQUAL)[1].times
        ahead = run(replace(args, rollouts_ahead=1), speeds, EQUAL)[1].times
        longer = max(alone["time/training"], alone["time/generation"])
        assert longer == alone[name]
        assert ahead["time/step"] == pytest.approx(longer + 0.5 + 0.1)


def test_tokens_of_a_rollout_ahead_are_old() -> None:
    drained = run(plan_args(rollouts_ahead=1))
    assert [step.old for step in drained] == [0.0, 1.0, 1.0, 1.0]
    assert all(step.old == 0.0 for step in run(plan_args()))
    aborting = plan_args(rollouts_ahead=1, update_weight_pause="abort")
    aborted = run(aborting, replace(SPEEDS, train_flops=5e9))
    assert all(0.0 < step.old < 1.0 for step in aborted[1:])


def test_partial_rollout_wastes_less() -> None:
    wide = plan_args(over_sampling_batch_size=8)
    bare, partial = run(wide, rollouts=8), run(replace(wide, partial_rollout=True), rollouts=8)
    assert sum(step.generated for step in partial) < sum(step.generated for step in bare)
    assert any(step.old > 0 for step in partial)


def test_dropped_groups_cost_time() -> None:
    plain = sum(step.times["time/generation"] for step in run(plan_args()))
    filtered = sum(step.times["time/generation"] for step in run(plan_args(simulate_drop_rate=0.5)))
    assert filtered > 1.4 * plain


def test_stale_groups_start_again() -> None:
    setting = {"over_sampling_batch_size": 12, "partial_rollout": True}
    restarted = run(plan_args(**setting, max_staleness=0), rollouts=6)
    assert sum(step.metrics["rollout/restarted_groups"] for step in restarted) > 0
    assert all(step.old == 0.0 for step in restarted)


def test_more_engines_are_never_slower() -> None:
    speeds = replace(SPEEDS, running_limit=2)
    seconds = [
        run(plan_args(rollout_num_gpus=engines), speeds, EQUAL)[1].times["time/generation"] for engines in (1, 2, 4, 8)
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < seconds[0] / 3


def test_long_responses_are_counted_in_larger_units() -> None:
    """Lengths in units of 100 tokens: the same step as with units of a token, up to rounding."""
    args = plan_args(rollout_max_response_len=100 * MOST_UNITS)
    long = LogNormal(2000.0, 2000.0, 100 * MOST_UNITS, prompt_length=8)
    step = run(args, lengths=long)[0]
    generation = 2000 * (0.01 + 6 * 0.002) + 2000 * (0.01 + 2 * 0.002) + 8 * 8 * 1e-4
    assert step.times["time/generation"] == pytest.approx(generation)
    assert (step.generated, step.trained) == (16_000, 8 * 2008)


def test_equal_runs_are_equal() -> None:
    args = plan_args(over_sampling_batch_size=7, partial_rollout=True)
    assert [step.times for step in run(args)] == [step.times for step in run(args)]


def test_closing_ends_a_rollout_in_flight() -> None:
    cluster = SimulatedCluster(plan_args(rollouts_ahead=1), SPEEDS, VARIED, num_rollouts=3)
    cluster.sync_weights()
    for rollout in cluster.rollouts():
        cluster.train(rollout, cluster.generate_ahead(rollout))
        break
    cluster.close()
