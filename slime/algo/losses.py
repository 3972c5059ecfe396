"""Losses: per-token inputs -> per-token loss and per-token metrics, with no reduction and no parallelism inside.

Path: the trainer's step feeds the log-probs of one micro-batch's response tokens, weighs what comes back with
`reducers.loss_weights` and sums it. Invariant: gradients flow through `log_probs_R` and `entropy_R` alone.

Shapes: _R response tokens of a micro-batch, flat. All log-probs are of softmax(logits / rollout temperature).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slime.algo.corrections import importance_weights
from slime.algo.reducers import KL_ESTIMATORS


@dataclass(frozen=True)
class LossInputs:
    """`sft_loss` reads `log_probs_R` alone. None: the flags ask for nothing that needs it."""

    log_probs_R: Tensor
    old_log_probs_R: Tensor
    advantages_R: Tensor
    ref_log_probs_R: Tensor | None = None
    rollout_log_probs_R: Tensor | None = None
    entropy_R: Tensor | None = None
    weighed_R: Tensor | None = None
    """bool: tokens that take an importance weight, old / rollout (see `corrections`). Masked ones are none."""


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The flags of the same names, resolved."""

    eps_clip: float
    eps_clip_high: float
    eps_clip_c: float | None
    kl_loss_coef: float
    kl_loss_type: str
    entropy_coef: float
    offpolicy_correction: str
    tis_clip: float
    tis_clip_low: float


Loss = Callable[[LossInputs, LossOptions], tuple[Tensor, dict[str, Tensor]]]


def policy_loss(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate (PPO, arXiv:1707.06347 eq. 7) with what the options add.

    - upper clip range of its own: DAPO's clip-higher (arXiv:2503.14476 eq. 10);
    - `eps_clip_c`: dual clip, for negative advantages the loss is at most -A c (arXiv:1912.09729 eq. 5);
    - `weighed_R`: the importance weight of tokens that another policy sampled (AReaL, arXiv:2505.24298);
    - coefficients x KL to the reference, and - entropy, neither of them weighed.
    """
    log_ratio_R = inputs.log_probs_R - inputs.old_log_probs_R
    ratio_R = log_ratio_R.exp()
    plain_R = -inputs.advantages_R * ratio_R
    clipped_R = -inputs.advantages_R * ratio_R.clamp(1 - options.eps_clip, 1 + options.eps_clip_high)
    loss_R = torch.maximum(plain_R, clipped_R)
    metrics = {"clip_fraction": (clipped_R > plain_R).float(), "ppo_kl": -log_ratio_R.detach()}
    if options.eps_clip_c is not None:
        ceiling_R = -inputs.advantages_R * options.eps_clip_c
        bounded_R = (inputs.advantages_R < 0) & (ceiling_R < loss_R)
        loss_R = torch.where(bounded_R, ceiling_R, loss_R)
        metrics["dual_clip_fraction"] = bounded_R.float()
    if inputs.rollout_log_probs_R is not None:
        metrics["logprob_gap"] = (inputs.old_log_probs_R - inputs.rollout_log_probs_R).abs().detach()
    if inputs.weighed_R is not None:
        assert inputs.rollout_log_probs_R is not None, "weights are taken against them"
        weights_R, beyond_R = importance_weights(
            inputs.old_log_probs_R,
            inputs.rollout_log_probs_R,
            inputs.weighed_R,
            low=options.tis_clip_low,
            high=options.tis_clip,
            drop=options.offpolicy_correction == "mis",
        )
        loss_R = loss_R * weights_R
        metrics |= {"tis_weight": weights_R, "tis_clipped": beyond_R.float()}
    metrics["pg_loss"] = loss_R.detach()
    if inputs.ref_log_probs_R is not None:
        kl_R = KL_ESTIMATORS[options.kl_loss_type](inputs.log_probs_R, inputs.ref_log_probs_R)
        metrics["kl"] = kl_R.detach()
        if options.kl_loss_coef:
            loss_R = loss_R + options.kl_loss_coef * kl_R
    if inputs.entropy_R is not None:
        metrics["entropy"] = inputs.entropy_R.detach()
        if options.entropy_coef:
            loss_R = loss_R - options.entropy_coef * inputs.entropy_R
    return loss_R, metrics


def sft_loss(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of each response token."""
    return -inputs.log_probs_R, {}


LOSSES: Mapping[str, Loss] = {"policy_loss": policy_loss, "sft_loss": sft_loss}
