"""Importance weights for tokens that were sampled by another policy than the one whose gradient is estimated.

- Used by: `losses.policy_loss` multiplies the clipped surrogate of each corrected token by its weight.
- Invariant: a token that is not corrected has weight exactly 1, whatever its log-probs are, and no gradient flows
  through a weight.

Three policies take part (decoupled PPO, Hilton et al., arXiv:2110.00641; for stale samples of a language model: AReaL,
arXiv:2505.24298):

- The behaviour policy sampled the token. Its log-prob is the one that the engine computed at that time, with the
  engine's numerics and the weights that it held then.
- The old policy ("proximal" in the papers) is the centre of the clip range: the trainer's weights before the first step
  on this rollout. With several steps per rollout, a separate forward pass computes its log-probs; with one step they
  are the current log-probs, detached.
- The current policy is the one being trained. The clip range bounds its ratio to the old policy; the behaviour policy
  plays no part in that ratio.

A weight is p_old / p_behaviour of one token. It corrects how often the token was drawn given its prefix. It does not
correct how often the prefix itself was drawn: that takes the product of the weights over the whole response, whose
variance is too large to be useful.
"""

from __future__ import annotations

import torch
from torch import Tensor


def importance_weights(
    proximal_R: Tensor, rollout_log_probs_R: Tensor, weighted_R: Tensor, *, low: float, high: float, drop: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the weights exp(proximal - behaviour log-prob), bounded to [low, high], and a mask of those out of range.

    With `low` 0 and `high` infinite this is the plain importance weight, which is unbiased. Truncation bounds the
    variance at the price of a bias, which is bounded as well (Ionides, "Truncated Importance Sampling", J. Comput.
    Graph. Stat. 17(2), 2008).

    Args:
        weighted_R: bool, the tokens that are corrected. All others get weight 1.
        drop: set a weight outside the range to 0 instead of to the nearest bound: a token that is so far off carries no
            usable signal (masked importance sampling; IcePop, arXiv:2510.18855).
    """
    log_weights_R = torch.where(weighted_R, proximal_R - rollout_log_probs_R, 0.0).detach()
    weights_R = log_weights_R.exp()
    beyond_R = weighted_R & ((weights_R < low) | (weights_R > high))
    bounded_R = torch.zeros_like(weights_R) if drop else weights_R.clamp(low, high)
    return torch.where(beyond_R, bounded_R, weights_R), beyond_R
