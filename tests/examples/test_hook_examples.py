"""The small examples of hooks work as described; those that need engines are in tests/rollout/test_tool_use.py."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.hooks import filters, rollouts, training
from examples.rewards.own_rewards import short_and_right
from slime.algo.losses import LossInputs
from slime.config.args import Args
from slime.core.sample import Sample, Status
from slime.megatron.advantages import loss_options


@pytest.fixture
def samples() -> list[Sample]:
    made = []
    for index, (reward, status) in enumerate([(1.0, Status.COMPLETED), (0.0, Status.TRUNCATED), (None, Status.FAILED)]):
        sample = Sample(group_index=0, index=index, tokens=[1, 2, 3, 4], prompt_length=2, response_length=2)
        sample.response, sample.label, sample.reward, sample.status = "is 51", "51", reward, status
        made.append(sample)
    return made


def test_a_reward(samples: list[Sample]) -> None:
    right, *_ = samples
    assert short_and_right(Args(), right) == 1.0
    right.label = "52"
    assert short_and_right(Args(), right) == 0.0


def test_filters(samples: list[Sample]) -> None:
    right, cut, _ = samples
    assert filters.not_too_easy(Args(), [right, cut]).keep
    easy = filters.not_too_easy(Args(), [right, right])
    assert (easy.keep, easy.reason) == (False, "too_easy")
    buffer = [[right], [cut]]
    assert filters.newest_first(Args(), 0, buffer, 5) == [[cut], [right]]
    assert buffer == []
    filters.no_truncated(Args(), samples)
    assert [sample.loss_mask for sample in samples] == [None, [0, 0], None]


def test_from_rewards_to_the_loss(samples: list[Sample]) -> None:
    args = Args(rollout_max_response_len=20)
    right, cut, failed = training.minus_length(args, samples)
    assert (right, cut) == pytest.approx((0.99, -0.01))
    assert math.isnan(failed)
    batch = training.only_judged(args, samples)
    assert len(batch) == 2
    assert np.allclose(training.reward_minus_mean(args, batch), [0.5, 0.5, -0.5, -0.5])
    log_probs_R = torch.zeros(2, requires_grad=True)
    inputs = LossInputs(log_probs_R, old_log_probs_R=log_probs_R.detach(), advantages_R=torch.tensor([2.0, -1.0]))
    loss_R, metrics = training.reinforce(inputs, loss_options(args))
    loss_R.sum().backward()
    assert log_probs_R.grad is not None
    assert log_probs_R.grad.tolist() == [-2.0, 1.0]
    assert set(metrics) == {"pg_loss"}


def test_a_log(samples: list[Sample], tmp_path: Path) -> None:
    for rollout_id in (7, 8):
        rollouts.log_longest(Args(log_dir=str(tmp_path)), rollout_id, samples, {})
    assert (tmp_path / "longest.txt").read_text() == "7 2 'is 51'\n8 2 'is 51'\n"
