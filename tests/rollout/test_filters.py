from __future__ import annotations

import pytest

from slime.config.args import Args
from slime.core.plugins import load_hook
from slime.core.sample import Sample

PATH = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [
        ([0.0, 1.0], True),
        ([1.0, 1.0], False),
        ([0.0] * 8, False),
        ([0.1, 0.1, 0.1], False),  # their float32 standard deviation is above 0
        ([0.5, 0.5, 0.5001], True),
        ([None, 1.0, 1.0], False),
        ([None, 0.0, 1.0], True),
        ([1.0, None], False),
        ([1.0], False),
    ],
)
def test_groups_all_right_or_all_wrong_are_dropped(rewards: list[float | None], kept: bool) -> None:
    check = load_hook("dynamic_sampling_filter_path", PATH)
    assert bool(check(Args(), [Sample(reward=reward) for reward in rewards])) is kept


def test_a_dict_reward_is_read_under_its_key() -> None:
    check = load_hook("dynamic_sampling_filter_path", PATH)
    samples = [Sample(reward={"right": right, "short": 1.0}) for right in (0.0, 1.0)]
    assert check(Args(reward_key="right"), samples)
    assert not check(Args(reward_key="short"), samples)
