"""The demo's control: every sample gets another sample's reward, so there is nothing to learn.

--custom-reward-post-process-path slime.cli.arithmetic.shuffled_rewards.shuffle
"""

from __future__ import annotations

import random
from typing import Any

from slime.core.sample import Sample


def shuffle(args: Any, samples: list[Sample]) -> list[float]:
    """Permute the rewards of a rollout over all samples that have one; the permutation depends on seed and rollout."""
    judged = [row for row, sample in enumerate(samples) if sample.reward is not None]
    payees = judged.copy()
    random.Random(f"{args.rollout_seed} {samples[0].index}").shuffle(payees)
    rewards = [float("nan")] * len(samples)
    for row, payee in zip(judged, payees, strict=True):
        rewards[payee] = samples[row].reward_value(args.reward_key)
    return rewards
