"""Corrections: importance weights for tokens that another policy made than the one whose gradient is estimated.

Path: `losses.policy_loss` multiplies the clipped surrogate of each weighed token by its weight. Invariant: a token that
is not weighed has weight exactly 1, whatever its log-probs are; no gradient flows through a weight.

Three policies take part (decoupled PPO, Hilton et al., arXiv:2110.00641; with stale samples of a language model:
AReaL, arXiv:2505.24298):
- the behaviour policy sampled the token: the engine's log-prob of then, by its numerics and the weights that it held;
- the proximal policy is what the clip range is around: the trainer's weights before this rollout's first step. With
  several steps a rollout a forward of its own takes their log-probs, with one step they are the current ones, detached;
- the current policy is trained: its ratio to the proximal policy is clipped, and knows nothing of the behaviour policy.
A weight is proximal / behaviour. It is one token's: it makes right how often the token was drawn after its prefix, and
not how often the prefix was; the product over all tokens of a response would, with a variance that nobody can use.

Shapes: _R response tokens, flat.
"""

from __future__ import annotations

import torch
from torch import Tensor


def importance_weights(
    proximal_R: Tensor, behaviour_R: Tensor, weighed_R: Tensor, *, low: float, high: float, drop: bool = False
) -> tuple[Tensor, Tensor]:
    """Weights exp(proximal - behaviour log-prob) within [low, high], and which tokens were beyond; 1 if not weighed.

    `low` 0 and `high` infinite: the plain importance weight, unbiased. Truncation bounds the variance and costs a bias
    that it bounds, too (Ionides, "Truncated Importance Sampling", J. Comput. Graph. Stat. 17(2), 2008).

    Args:
        weighed_R: bool.
        drop: a weight beyond the range becomes 0 and not the range's end: what is so far off says nothing (masked
            importance sampling; IcePop, arXiv:2510.18855).
    """
    log_weights_R = torch.where(weighed_R, proximal_R - behaviour_R, 0.0).detach()
    weights_R = log_weights_R.exp()
    beyond_R = weighed_R & ((weights_R < low) | (weights_R > high))
    bounded_R = torch.zeros_like(weights_R) if drop else weights_R.clamp(low, high)
    return torch.where(beyond_R, bounded_R, weights_R), beyond_R
