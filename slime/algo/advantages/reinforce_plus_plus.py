"""REINFORCE++: each token's return, whitened over the whole rollout (arXiv:2501.03262).

No critic, and no baseline but the rollout's mean: a prompt may have one response. With kl_coef, a token's own KL to the
reference is taken from its reward.
"""

from __future__ import annotations

from torch import Tensor

from slime.algo.advantages.rollout_rewards import AdvantageOptions, RolloutRewards, discounted_returns
from slime.algo.reducers import whiten


def reinforce_plus_plus(rollout: RolloutRewards, options: AdvantageOptions) -> Tensor:
    """(G - mean) / std over all counted tokens; G_t = sum over s >= t of gamma^(s - t) x the reward of token s."""
    return whitened_returns(rollout, rollout.rewards_N, options)


def whitened_returns(rollout: RolloutRewards, rewards_N: Tensor, options: AdvantageOptions) -> Tensor:
    rewards_NL = rollout.token_rewards_NL(rewards_N, options)
    returns_R = rollout.flat(discounted_returns(rewards_NL, options.gamma))
    return whiten(returns_R, rollout.mask_R)
