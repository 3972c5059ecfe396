"""Generalised advantage estimation, for PPO with a critic (arXiv:1506.02438, eqs. 11, 12 and 16).

A counted token is one step of the episode, and its state is what it was sampled from; tokens that the mask leaves out
are part of the next state. The score stands at the last counted token, and nothing comes behind it: its next value is
0. What the critic learns are advantages + values, the returns of TD(lambda).

Shapes: _N samples of the rollout, _R response tokens of all samples, flat, _L a sample's counted tokens (see
`rollout_rewards`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime.algo.advantages.rollout_rewards import AdvantageOptions, RolloutRewards, discounted_returns


def gae(rollout: RolloutRewards, options: AdvantageOptions) -> Tensor:
    """[R] A_t = sum over l of (gamma lambda)^l delta_(t+l), with delta_t = r_t + gamma V_(t+1) - V_t."""
    assert rollout.values_R is not None, "the critic's values come before advantages"
    rewards_NL = rollout.token_rewards_NL(rollout.rewards_N, options)
    values_NL = rollout.padded(rollout.values_R)
    next_NL = torch.cat([values_NL[:, 1:], torch.zeros_like(values_NL[:, :1])], dim=1)
    deltas_NL = rewards_NL + options.gamma * next_NL - values_NL
    return rollout.flat(discounted_returns(deltas_NL, options.gamma * options.lambd))
