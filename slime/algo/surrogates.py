"""Surrogates: the forms of the policy loss, which differ in how the ratio of current to old policy enters.

- Used by: `losses.policy_loss` picks the estimator's form (`estimators.ESTIMATOR_FACTS`), then adds importance weights,
  KL and entropy.
- Invariant: at a ratio of 1, the gradient of every form is that of -A log p, on every token.

_R: the response tokens of one micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime.algo.sequences import Sequences


def token_ratio(log_probs_R: Tensor, old_log_probs_R: Tensor) -> Tensor:
    """Return p / p_old of each token, as in PPO (arXiv:1707.06347 eq. 6), GRPO and DAPO."""
    return (log_probs_R - old_log_probs_R).exp()


def sequence_ratio(log_probs_R: Tensor, old_log_probs_R: Tensor, sequences: Sequences, mask_R: Tensor) -> Tensor:
    """Return the geometric mean of a response's token ratios, on each of its tokens: GSPO (arXiv:2507.18071 eq. 7).

    The gradient goes through the token's own log-prob (GSPO-token, eq. 14). When all tokens of a response share one
    advantage, this equals the gradient of eq. 5, and no gradient has to be sent between ranks.
    """
    with torch.no_grad():
        log_ratio_R = sequences.mean_of(log_probs_R - old_log_probs_R, mask_R)
    return (log_ratio_R + log_probs_R - log_probs_R.detach()).exp()


def clipped(
    ratio_R: Tensor, advantages_R: Tensor, *, low: float, high: float, ceiling: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return -min(ratio A, clip(ratio, low, high) A) (PPO eq. 7) and the fraction metrics.

    An asymmetric range is DAPO's clip-higher (arXiv:2503.14476 eq. 10). With `ceiling` c, the loss of a token with a
    negative advantage is at most -A c (dual clip, arXiv:1912.09729 eq. 5). Example with A = -1, ratio 5, high 1.2 and c
    = 3: the clipped loss is max(5, 1.2) = 5, the dual clip lowers it to 3, and the token gets no gradient.
    """
    plain_R = -advantages_R * ratio_R
    clipped_R = -advantages_R * ratio_R.clamp(low, high)
    loss_R = torch.maximum(plain_R, clipped_R)
    metrics = {"clip_fraction": (clipped_R > plain_R).float()}
    if ceiling is not None:
        ceiling_R = -advantages_R * ceiling
        bounded_R = (advantages_R < 0) & (ceiling_R < loss_R)
        loss_R = torch.where(bounded_R, ceiling_R, loss_R)
        metrics["dual_clip_fraction"] = bounded_R.float()
    return loss_R, metrics


def weighted_log_probs(
    log_probs_R: Tensor, ratio_R: Tensor, advantages_R: Tensor, *, low: float, high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return -sg(clip(ratio, low, high)) A log p: CISPO (MiniMax-M1, arXiv:2506.13585 eq. 4 and 5).

    The ratio is clipped as a weight, through which no gradient flows (sg: stop gradient), so every token keeps the
    gradient of its own log-prob.
    """
    weights_R = ratio_R.detach().clamp(low, high)
    return -weights_R * advantages_R * log_probs_R, {"clip_fraction": (weights_R != ratio_R.detach()).float()}
