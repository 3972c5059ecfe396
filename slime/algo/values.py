"""The critic's loss, and how much of the returns the critic explains.

- Used by: the critic's step, which passes the values of one micro-batch's response tokens and sums the result with the
  weights that the policy's loss uses.
- Invariant: gradients flow through `values_R` alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(
    values_R: Tensor, old_values_R: Tensor, returns_R: Tensor, *, clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (V - G)^2 / 2 of each token and its metrics; with `clip`, PPO's form, which keeps V near the old value.

    Clipped: max((V - G)^2, (V_old + clamp(V - V_old, -clip, clip) - G)^2) / 2, as in OpenAI's baselines (ppo2) for
    arXiv:1707.06347. When the clipped term is the larger one, V has left the range, and the token gets no gradient.
    """
    plain_R = (values_R - returns_R).square() / 2
    if clip is None:
        return plain_R, {}
    moved_R = values_R - old_values_R
    clipped_R = (old_values_R + moved_R.clamp(-clip, clip) - returns_R).square() / 2
    bounded_R = (moved_R.abs() > clip) & (clipped_R > plain_R)  # inside the range both terms are equal up to rounding
    return torch.maximum(plain_R, clipped_R), {"clip_fraction": bounded_R.float()}


def explained_variance(values_R: Tensor, returns_R: Tensor, mask_R: Tensor) -> float | None:
    """Return 1 - Var(G - V) / Var(G) over the masked tokens: 1 is perfect, 0 is no better than a constant.

    None when all returns are equal, or when there are none.
    """
    returns, values = returns_R[mask_R].double(), values_R[mask_R].double()
    if len(returns) == 0 or bool((returns == returns[0]).all()):
        return None
    return float(1 - (returns - values).var(correction=0) / returns.var(correction=0))
