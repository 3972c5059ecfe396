"""Losses: per-token inputs -> per-token loss and per-token metrics, with no reduction and no parallelism inside.

- Used by: the trainer's step, which passes the log-probs of one micro-batch's response tokens and sums the result with
  the weights of `reducers.loss_weights`.
- Invariant: gradients flow through `log_probs_R` and `entropy_R` alone.

_R: the response tokens of one micro-batch. All log-probs are of softmax(logits / rollout temperature).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from slime.algo.corrections import importance_weights
from slime.algo.estimators import Surrogate
from slime.algo.reducers import bounded_kl
from slime.algo.sequences import Sequences
from slime.algo.surrogates import clipped, sequence_ratio, token_ratio, weighted_log_probs


@dataclass(frozen=True)
class LossInputs:
    """Everything a loss may read. A field is None when no flag needs it; `sft_loss` reads `log_probs_R` alone.

    A field NAME_R holds the batch column NAME where `core.columns` declares it with `loss_input`; the log-probs and the
    entropy come from this step's forward pass. Every other column with one entry a response token is in `columns`.
    """

    log_probs_R: Tensor
    old_log_probs_R: Tensor
    advantages_R: Tensor
    ref_log_probs_R: Tensor | None = None
    rollout_log_probs_R: Tensor | None = None
    entropy_R: Tensor | None = None
    weighted_R: Tensor | None = None
    """bool: tokens that take an importance weight, p_old / p_rollout (see `corrections`). No masked token does."""
    loss_mask_R: Tensor | None = None
    sequences: Sequences | None = None
    """Maps tokens to responses, for losses that need whole responses; set in every training step."""
    columns: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """All columns [R] of the micro-batch by name, for a custom loss that reads a column without a field here."""


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The values of the flags with the same names, after defaults are resolved."""

    surrogate: Surrogate
    """Chosen by --advantage-estimator; see `estimators.ESTIMATOR_FACTS`."""
    eps_clip: float
    eps_clip_high: float
    eps_clip_c: float | None
    kl_loss_coef: float
    kl_loss_type: str
    kl_clamp: float | None = None
    """`Args.kl_loss_clamp`; None means that the KL estimate is not bounded."""
    entropy_coef: float
    offpolicy_correction: str
    tis_clip: float
    tis_clip_low: float


Loss = Callable[[LossInputs, LossOptions], tuple[Tensor, dict[str, Tensor]]]


def policy_loss(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the policy loss of each token and its metrics: the clipped surrogate, importance weights, KL and entropy.

    loss = weight x surrogate + kl_loss_coef x KL - entropy_coef x entropy

    - `weighted_R` selects the tokens that another policy sampled; they get an importance weight (AReaL,
      arXiv:2505.24298).
    - The weight applies to the surrogate alone, not to the KL to the reference model and not to the entropy.

    Metrics, each [R]: `clip_fraction`, `ppo_kl` (old - current log-prob) and `pg_loss` always; `dual_clip_fraction`,
    `tis_weight`, `tis_clipped`, `kl`, `kl_clamp_fraction` and `entropy` when their inputs are given.
    """
    loss_R, metrics = _surrogate(inputs, options)
    metrics["ppo_kl"] = (inputs.old_log_probs_R - inputs.log_probs_R).detach()
    if inputs.weighted_R is not None:
        assert inputs.rollout_log_probs_R is not None, "importance weights need the behaviour policy's log-probs"
        weights_R, beyond_R = importance_weights(
            inputs.old_log_probs_R,
            inputs.rollout_log_probs_R,
            inputs.weighted_R,
            low=options.tis_clip_low,
            high=options.tis_clip,
            drop=options.offpolicy_correction == "mis",
        )
        loss_R = loss_R * weights_R
        metrics |= {"tis_weight": weights_R, "tis_clipped": beyond_R.float()}
    metrics["pg_loss"] = loss_R.detach()
    if inputs.ref_log_probs_R is not None:
        kl_R, beyond_R = bounded_kl(options.kl_loss_type, inputs.log_probs_R, inputs.ref_log_probs_R, options.kl_clamp)
        metrics["kl"] = kl_R.detach()
        if beyond_R is not None:
            metrics["kl_clamp_fraction"] = beyond_R.float()
        if options.kl_loss_coef:
            loss_R = loss_R + options.kl_loss_coef * kl_R
    if inputs.entropy_R is not None:
        metrics["entropy"] = inputs.entropy_R.detach()
        if options.entropy_coef:
            loss_R = loss_R - options.entropy_coef * inputs.entropy_R
    return loss_R, metrics


def _surrogate(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    log_probs_R, old_R, advantages_R = inputs.log_probs_R, inputs.old_log_probs_R, inputs.advantages_R
    low, high = 1 - options.eps_clip, 1 + options.eps_clip_high
    if options.surrogate == "cispo":
        return weighted_log_probs(log_probs_R, token_ratio(log_probs_R, old_R), advantages_R, low=low, high=high)
    if options.surrogate == "sequence":
        assert inputs.sequences is not None and inputs.loss_mask_R is not None, "a sequence ratio needs whole responses"
        ratio_R = sequence_ratio(log_probs_R, old_R, inputs.sequences, inputs.loss_mask_R)
    else:
        ratio_R = token_ratio(log_probs_R, old_R)
    return clipped(ratio_R, advantages_R, low=low, high=high, ceiling=options.eps_clip_c)


def sft_loss(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the negative log-likelihood of each response token."""
    return -inputs.log_probs_R, {}


LOSSES: Mapping[str, Loss] = {"policy_loss": policy_loss, "sft_loss": sft_loss}
