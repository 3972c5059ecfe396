"""The critic's loss, and how much of the returns its values explain.

Path: the critic's step feeds the values of one micro-batch's response tokens, and weighs what comes back as the
policy's loss is weighed. Invariant: gradients flow through `values_R` alone.

Shapes: _R response tokens, flat.
"""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(
    values_R: Tensor, old_values_R: Tensor, returns_R: Tensor, *, clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(V - G)^2 / 2 of each token, and metrics; with `clip` PPO's, which keeps V near what it was.

    Clipped: max((V - G)^2, (V_old + clamp(V - V_old, -clip, clip) - G)^2) / 2, as OpenAI's baselines (ppo2) have it for
    arXiv:1707.06347. Where the clipped term is the larger one, V has gone beyond the range, and gets no gradient.
    """
    plain_R = (values_R - returns_R).square() / 2
    if clip is None:
        return plain_R, {}
    moved_R = values_R - old_values_R
    clipped_R = (old_values_R + moved_R.clamp(-clip, clip) - returns_R).square() / 2
    bounded_R = (moved_R.abs() > clip) & (clipped_R > plain_R)  # within the range they differ by a rounding at most
    return torch.maximum(plain_R, clipped_R), {"clip_fraction": bounded_R.float()}


def explained_variance(values_R: Tensor, returns_R: Tensor, mask_R: Tensor) -> float | None:
    """1 - Var(G - V) / Var(G) over the masked tokens: 1 is perfect, 0 as good as a constant; None where G is one."""
    returns, values = returns_R[mask_R].double(), values_R[mask_R].double()
    if len(returns) == 0 or bool((returns == returns[0]).all()):
        return None
    return float(1 - (returns - values).var(correction=0) / returns.var(correction=0))
