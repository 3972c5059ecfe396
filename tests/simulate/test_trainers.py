"""Timed trainers against arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slime.config.args import Args
from slime.core.packing import training_flops
from slime.simulate.trainers import TimedTrainers
from tests.simulate.plans_for_tests import plan_args


def seconds_of(args: Args, lengths: list[int]) -> float:
    return TimedTrainers(args, 1e12).train(lengths).seconds


def test_one_trainer_takes_the_time_of_its_flops() -> None:
    args = plan_args(num_steps_per_rollout=1)
    flops = training_flops(args.resolved.architecture)
    assert seconds_of(args, [100, 300]) == pytest.approx((flops(100) + flops(300)) / 1e12)


def test_a_step_waits_for_the_slowest_rank() -> None:
    args = plan_args(actor_num_gpus_per_node=2, num_steps_per_rollout=1)
    flops = training_flops(args.resolved.architecture)
    training = TimedTrainers(args, 1e12).train([100, 100, 300, 300])  # two in a row for each rank
    assert training.seconds == pytest.approx(2 * flops(300) / 1e12)
    assert training.busy == pytest.approx([2 * flops(100) / 1e12, 2 * flops(300) / 1e12])
    balanced = TimedTrainers(replace(args, balance_data=True), 1e12).train([100, 100, 300, 300])
    assert balanced.seconds == pytest.approx((flops(100) + flops(300)) / 1e12)


def test_tensor_parallel_ranks_share_the_work() -> None:
    one = seconds_of(plan_args(num_steps_per_rollout=1), [100, 300])
    two = plan_args(num_steps_per_rollout=1, actor_num_gpus_per_node=2, tensor_model_parallel_size=2)
    assert seconds_of(two, [100, 300]) == pytest.approx(one / 2)


def test_a_pipeline_is_filled_and_emptied() -> None:
    """Two stages, four micro-batches: (4 + 1) / 4 times as long as without a bubble, on half the time."""
    one = seconds_of(plan_args(num_steps_per_rollout=1), [100] * 4)
    args = plan_args(num_steps_per_rollout=1, actor_num_gpus_per_node=2, pipeline_model_parallel_size=2)
    assert seconds_of(args, [100] * 4) == pytest.approx(one / 2 * 5 / 4)


def test_pipeline_micro_batches_are_in_order_of_cost() -> None:
    sizes = {"num_steps_per_rollout": 1, "actor_num_gpus_per_node": 2, "use_dynamic_batch_size": True}
    lengths = [500, 100, 900, 300]
    for layout, expected in (("pipeline", [100, 500, 900, 300]), ("tensor", sorted(lengths, reverse=True))):
        args = plan_args(**sizes, **{f"{layout}_model_parallel_size": 2, "max_tokens_per_gpu": 1})
        [plan] = TimedTrainers(args, 1e12).plan(lengths)
        assert [lengths[row] for [row] in plan.micro_batches[0]] == expected, layout


def test_more_passes_take_longer() -> None:
    args = plan_args(num_steps_per_rollout=1)
    once = seconds_of(args, [100] * 4)
    reference = replace(args, use_kl_loss=True, kl_loss_coef=0.1)
    assert seconds_of(reference, [100] * 4) == pytest.approx(4 / 3 * once)
    assert seconds_of(replace(args, num_steps_per_rollout=2), [100] * 4) == pytest.approx(4 / 3 * once)
    recomputes = replace(args, recompute_granularity="full", recompute_method="uniform")
    assert seconds_of(recomputes, [100] * 4) == pytest.approx(4 / 3 * once)
