"""Reducers: what turns per-token values into numbers: KL estimators, masked means, whitening, loss weights.

Path: losses use the KL estimators, with or without a bound; the trainer computes `loss_weights` once a step, and the
step's loss is sum(weights x per-token loss). Invariant: a step's weights sum to 1, so neither the cut into
micro-batches nor the deal to ranks changes the loss.

Shapes: _N samples, _R response tokens of all samples, flat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def k1(log_probs_R: Tensor, ref_log_probs_R: Tensor) -> Tensor:
    """log p - log p_ref: unbiased for KL(p || p_ref) where p sampled (Schulman, "Approximating KL Divergence")."""
    return log_probs_R - ref_log_probs_R


def k2(log_probs_R: Tensor, ref_log_probs_R: Tensor) -> Tensor:
    """(log p - log p_ref)^2 / 2: biased, low variance, never negative."""
    return (log_probs_R - ref_log_probs_R).square() / 2


def k3(log_probs_R: Tensor, ref_log_probs_R: Tensor) -> Tensor:
    """r - 1 - log r with r = p_ref / p: unbiased and never negative (the same note; DeepSeekMath eq. 4)."""
    log_ratio_R = ref_log_probs_R - log_probs_R
    return torch.expm1(log_ratio_R) - log_ratio_R


KL_ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3, "low_var_kl": k3}


def bounded_kl(
    kind: str, log_probs_R: Tensor, ref_log_probs_R: Tensor, clamp: float | None
) -> tuple[Tensor, Tensor | None]:
    """The KL estimate of each token within [-clamp, clamp], and which tokens were beyond; None: no bound.

    A token beyond the bound gets no gradient. k3 is exponential in the log-ratio where the reference is the likelier
    one: at a log-ratio of 5 its gradient is -147, and one such token outweighs a whole batch. The estimate is taken at
    a log-ratio of 0 there, so that an infinite one does not turn the gradient into nan.
    """
    estimator = KL_ESTIMATORS[kind]
    if clamp is None:
        return estimator(log_probs_R, ref_log_probs_R), None
    with torch.no_grad():
        kl_R = estimator(log_probs_R, ref_log_probs_R)
        beyond_R = kl_R.abs() > clamp
        bound_R = kl_R.sign() * clamp
    inside_R = estimator(torch.where(beyond_R, ref_log_probs_R, log_probs_R), ref_log_probs_R)
    return torch.where(beyond_R, bound_R, inside_R), beyond_R


def masked_mean(values_R: Tensor, mask_R: Tensor) -> Tensor:
    """0-d mean of the values where the mask is not 0; 0 where it is 0 everywhere."""
    kept_R = torch.where(mask_R != 0, values_R, 0.0)  # not a product: nan x 0 is nan
    return kept_R.sum() / (mask_R != 0).sum().clamp(min=1)


def whiten(values_R: Tensor, mask_R: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the masked entries, in float64; 0 outside the mask."""
    values = values_R.double()
    centred = torch.where(mask_R != 0, values - masked_mean(values, mask_R), 0.0)
    std = masked_mean(centred.square(), mask_R).sqrt()
    return (centred / (std + 1e-8)).to(values_R.dtype)


def loss_weights(loss_mask_R: Tensor, response_lengths_N: Tensor, counted_N: Tensor, *, per_token: bool) -> Tensor:
    """[R] float64: each token's weight in the loss of the step that the rows make up.

    Per sample (default): mask / (the sample's masked tokens) / (samples that count), the mean of samples' means.
    Per token: mask / (masked tokens of all samples that count). A sample counts where `counted_N` says so and its
    mask is not empty. The weights sum to 1, or to 0 where nothing counts.
    """
    row_R = torch.repeat_interleave(torch.arange(len(response_lengths_N)), response_lengths_N)
    mask_R = loss_mask_R.double() * counted_N[row_R]
    if per_token:
        return mask_R / mask_R.sum().clamp(min=1)
    tokens_N = mask_R.new_zeros(len(response_lengths_N)).index_add_(0, row_R, mask_R)
    return mask_R / tokens_N.clamp(min=1)[row_R] / (tokens_N > 0).sum().clamp(min=1)
