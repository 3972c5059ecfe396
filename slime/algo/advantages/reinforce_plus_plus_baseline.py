"""REINFORCE++ with a baseline: subtract the group's mean from the rewards, then do as REINFORCE++ (arXiv:2501.03262).

The result is whitened over the whole rollout, whereas grpo divides by each group's own standard deviation.
"""

from __future__ import annotations

from torch import Tensor

from slime.algo.advantages.grpo import grpo_advantages
from slime.algo.advantages.reinforce_plus_plus import whitened_returns
from slime.algo.advantages.rollout_rewards import AdvantageOptions, RolloutRewards


def reinforce_plus_plus_baseline(rollout: RolloutRewards, options: AdvantageOptions) -> Tensor:
    """Return the whitened returns of rewards - group mean; the KL stays with its token and is not in the mean."""
    centred_N = grpo_advantages(rollout.rewards_N.double(), rollout.group_indices_N, normalize_std=False)
    return whitened_returns(rollout, centred_N, options)
