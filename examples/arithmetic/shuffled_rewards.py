"""The demo's control: every sample is paid for another one's answer, so there is nothing to learn.

--custom-reward-post-process-path examples.arithmetic.shuffled_rewards.shuffle
"""

from __future__ import annotations

import random
from typing import Any

from slime.core.sample import Sample


def shuffle(args: Any, samples: list[Sample]) -> list[float]:
    """The rewards of a rollout, permuted over all of its samples; the permutation goes by seed and rollout."""
    rewards = [float("nan") if sample.reward is None else sample.reward_value(args.reward_key) for sample in samples]
    random.Random(f"{args.rollout_seed} {samples[0].index}").shuffle(rewards)
    return rewards
