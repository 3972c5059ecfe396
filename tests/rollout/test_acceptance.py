"""The number of rewards that a group needs: as many as the estimator compares."""

from __future__ import annotations

import pytest

from slime.config.args import Args
from slime.core.sample import Sample, Status
from slime.rollout.acceptance import Acceptance

HOOK = "examples.hooks.training.reward_minus_mean"


def group(*rewards: float | None) -> list[Sample]:
    made = []
    for index, reward in enumerate(rewards):
        sample = Sample(group_index=0, index=index, tokens=[1, 2], prompt_length=1, response_length=1)
        sample.reward, sample.status = reward, Status.COMPLETED
        made.append(sample)
    return made


@pytest.mark.parametrize(
    ("flags", "least"),
    [
        ({}, 2),
        ({"advantage_estimator": "rloo"}, 2),
        ({"advantage_estimator": "reinforce_plus_plus_baseline"}, 2),
        ({"advantage_estimator": "reinforce_plus_plus"}, 1),
        ({"advantage_estimator": "ppo"}, 1),
        ({"custom_advantage_function_path": HOOK}, 1),
        ({"loss_type": "sft_loss"}, 1),
    ],
)
def test_a_group_needs_the_rewards_that_it_compares(flags: dict[str, str], least: int) -> None:
    acceptance = Acceptance(Args(**flags))  # pyright: ignore[reportArgumentType]
    assert acceptance.drop_reason(group(1.0, 0.0)) is None
    assert acceptance.drop_reason(group(1.0, None)) == (None if least == 1 else "too_few_rewards")
    assert acceptance.drop_reason(group(None, None)) == "too_few_rewards"
