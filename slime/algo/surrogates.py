"""Surrogates: the policy loss's forms, by how the ratio of current to old policy enters.

Path: `losses.policy_loss` takes the one that the estimator asks for (`estimators.ESTIMATOR_FACTS`), and adds importance
weights, KL and entropy to it. Invariant: at a ratio of 1 the gradient of each is that of -A log p, on every token.

Shapes: _R response tokens of a micro-batch, flat.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime.algo.sequences import Sequences


def token_ratio(log_probs_R: Tensor, old_log_probs_R: Tensor) -> Tensor:
    """p / p_old of each token: PPO (arXiv:1707.06347 eq. 6), GRPO, DAPO."""
    return (log_probs_R - old_log_probs_R).exp()


def sequence_ratio(log_probs_R: Tensor, old_log_probs_R: Tensor, sequences: Sequences, mask_R: Tensor) -> Tensor:
    """The geometric mean of a response's token ratios, on each of its tokens: GSPO (arXiv:2507.18071 eq. 7).

    The gradient goes through the token's own log-prob (GSPO-token, eq. 14). Over a response whose tokens share one
    advantage that is eq. 5's gradient, and nothing has to flow back between ranks.
    """
    with torch.no_grad():
        log_ratio_R = sequences.mean_of(log_probs_R - old_log_probs_R, mask_R)
    return (log_ratio_R + log_probs_R - log_probs_R.detach()).exp()


def clipped(
    ratio_R: Tensor, advantages_R: Tensor, *, low: float, high: float, ceiling: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(ratio A, clip(ratio, low, high) A) (PPO eq. 7).

    A range that is not symmetric is DAPO's clip-higher (arXiv:2503.14476 eq. 10). `ceiling` c: for negative advantages
    the loss is at most -A c (dual clip, arXiv:1912.09729 eq. 5).
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


def weighed_log_probs(
    log_probs_R: Tensor, ratio_R: Tensor, advantages_R: Tensor, *, low: float, high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sg(clip(ratio, low, high)) A log p: CISPO (MiniMax-M1, arXiv:2506.13585 eq. 4 and 5).

    What is clipped is a weight, through which no gradient flows: every token keeps its own.
    """
    weights_R = ratio_R.detach().clamp(low, high)
    return -weights_R * advantages_R * log_probs_R, {"clip_fraction": (weights_R != ratio_R.detach()).float()}
