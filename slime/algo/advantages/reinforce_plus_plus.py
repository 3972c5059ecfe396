"""REINFORCE++: each token's return, whitened over the whole rollout (arXiv:2501.03262).

It has no critic, and the rollout's mean is the only baseline, so one response per prompt is enough. With kl_coef, each
token's own KL to the reference model is subtracted from its reward.
"""

from __future__ import annotations

from torch import Tensor

from slime.algo.advantages.rollout_rewards import AdvantageOptions, RolloutRewards, discounted_returns


def reinforce_plus_plus(rollout: RolloutRewards, options: AdvantageOptions) -> Tensor:
    """Return (G - mean) / std over all counted tokens; G_t is the sum over s >= t of gamma^(s - t) x reward_s."""
    return whitened_returns(rollout, rollout.rewards_N, options)


def whitened_returns(rollout: RolloutRewards, rewards_N: Tensor, options: AdvantageOptions) -> Tensor:
    """Return [R]: the discounted returns of `rewards_N`, which come with the last token, whitened over the rollout."""
    rewards_ML = rollout.token_rewards_ML(rewards_N, options)
    returns_R = rollout.flat(discounted_returns(rewards_ML, options.gamma))
    return rollout.whitened(returns_R)
