from __future__ import annotations

import pytest

from slime.config.args import Args
from slime.core.sample import Sample, Status
from slime.rollout.intervals import PhaseIntervals
from slime.rollout.metrics import Tally, group_metrics, replay_metrics, rollout_metrics


def _groups() -> list[list[Sample]]:
    """Three judged samples and a failed one; the reward in training is twice the judged reward."""
    rewards = [[1.0, 0.0], [1.0, None]]
    return [
        [
            Sample(
                reward=None if reward is None else {"right": 2 * reward, "short": 7.0},
                response_length=length,
                status=Status.TRUNCATED if length == 3 else Status.COMPLETED,
                metadata={} if reward is None else {"raw_reward": {"right": reward, "short": 7.0}},
            )
            for reward, length in zip(group, (1, 3), strict=True)
        ]
        for group in rewards
    ]


def test_a_replay_repeats_the_rollouts_metrics() -> None:
    args = Args(reward_key="right")
    assert replay_metrics(args, _groups()) == {
        "rollout/reward": pytest.approx(2 / 3),
        "rollout/reward_std": pytest.approx(2**0.5 / 3),
        "rollout/reward/short": 7.0,
        "rollout/zero_std_groups": 1,
        "rollout/response_length": 2,
        "rollout/response_length_max": 3,
        "rollout/truncated": 0.5,
    }
    assert group_metrics(args, _groups())["rollout/reward"] == pytest.approx(4 / 3)
    assert replay_metrics(Args(reward_key="short"), _groups())["rollout/reward"] == 7
    with pytest.raises(ValueError, match="--reward-key is not given"):
        replay_metrics(Args(), _groups())


def test_no_reward_is_reported_without_verdicts() -> None:
    assert set(replay_metrics(Args(), [[Sample(response_length=1)]])) == {
        "rollout/response_length",
        "rollout/response_length_max",
        "rollout/truncated",
    }


def test_staleness_is_of_sampled_tokens() -> None:
    """A tool's tokens (loss mask 0) carry the version of the tokens before them, but no policy sampled them."""
    sample = Sample(response_length=4, reward=1.0, policy_versions=[2, 0, 0, 3], loss_mask=[1, 0, 0, 1])
    metrics = rollout_metrics(Args(), [[sample]], Tally(), PhaseIntervals(), 3)
    assert metrics["rollout/staleness"] == 0.5
    assert metrics["rollout/staleness_max"] == 1
    assert metrics["rollout/offpolicy_tokens"] == 0.5
    sample.loss_mask = None
    assert rollout_metrics(Args(), [[sample]], Tally(), PhaseIntervals(), 3)["rollout/staleness_max"] == 3
