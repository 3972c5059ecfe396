"""Generalized advantage estimation, for PPO with a critic (arXiv:1506.02438, eqs. 11, 12 and 16).

Each counted token is one step of the episode; its state is the text from which it was sampled. Tokens that the mask
leaves out belong to the next state. The reward comes with the last counted token, and the episode ends there: the value
after it is 0. The critic learns advantages + values, which are the TD(lambda) returns.

_L: a sample's counted tokens, padded (see `rollout_rewards`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime.algo.advantages.rollout_rewards import AdvantageOptions, RolloutRewards, discounted_returns


def gae(rollout: RolloutRewards, options: AdvantageOptions) -> Tensor:
    """Return A_t = sum over l of (gamma lambda)^l delta_(t+l), with delta_t = r_t + gamma V_(t+1) - V_t, as [R]."""
    assert rollout.values_R is not None, "GAE needs the critic's values"
    rewards_ML = rollout.token_rewards_ML(rollout.rewards_N, options)
    values_ML = rollout.padded(rollout.values_R)
    next_ML = torch.cat([values_ML[:, 1:], torch.zeros_like(values_ML[:, :1])], dim=1)
    deltas_ML = rewards_ML + options.gamma * next_ML - values_ML
    return rollout.flat(discounted_returns(deltas_ML, options.gamma * options.lambd))
