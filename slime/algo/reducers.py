"""Turn per-token values into numbers: KL estimators, masked means, whitening, loss weights.

- Used by: the losses (KL estimators, with or without a bound) and the trainer, which computes `loss_weights` once a
  step; the step's loss is sum(weights x per-token loss).
- Invariant: the weights of a step sum to 1, so the loss does not depend on how the step is cut into micro-batches or
  which rank gets which rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def k1(log_probs_R: Tensor, ref_log_probs_R: Tensor) -> Tensor:
    """Return log p - log p_ref: unbiased for KL(p || p_ref) if p sampled (Schulman, "Approximating KL Divergence")."""
    return log_probs_R - ref_log_probs_R


def k2(log_probs_R: Tensor, ref_log_probs_R: Tensor) -> Tensor:
    """Return (log p - log p_ref)^2 / 2: biased, low variance, never negative."""
    return (log_probs_R - ref_log_probs_R).square() / 2


def k3(log_probs_R: Tensor, ref_log_probs_R: Tensor) -> Tensor:
    """Return r - 1 - log r with r = p_ref / p: unbiased and never negative (Schulman's note; DeepSeekMath eq. 4)."""
    log_ratio_R = ref_log_probs_R - log_probs_R
    return torch.expm1(log_ratio_R) - log_ratio_R


KL_ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3, "low_var_kl": k3}


def bounded_kl(
    kind: str, log_probs_R: Tensor, ref_log_probs_R: Tensor, clamp: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return each token's KL estimate, bounded to [-clamp, clamp], and a mask of those out of range (None: no bound).

    A token out of range gets no gradient. k3 grows exponentially when the reference finds the token more likely than
    the policy does: at log p_ref - log p = 5 its gradient is -147, so one such token outweighs a whole batch. For these
    tokens the estimate is evaluated at a log-ratio of 0 and then replaced, because an infinite log-ratio would turn the
    gradient into nan.
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


def sums_of_rows(values_R: Tensor, row_R: Tensor, num_rows: int) -> Tensor:
    """Return [rows]: the sum of each row's values, added up in order, so that a row's sum depends on that row alone."""
    return values_R.new_zeros(num_rows).index_add_(0, row_R, values_R)


def whiten(values_R: Tensor, mask_R: Tensor, total: Callable[[Tensor], float]) -> Tensor:
    """Shift and scale to mean 0 and standard deviation 1 over the masked entries, in float64; 0 outside the mask.

    `total` returns the sum of such a [R] over all tokens that are whitened together, of which [R] may be a part.
    """
    values, inside = values_R.double(), mask_R != 0
    count = max(total(inside), 1.0)
    mean = total(torch.where(inside, values, 0.0)) / count  # `where` and not a product, because nan x 0 is nan
    centred = torch.where(inside, values - mean, 0.0)
    std = (total(centred.square()) / count) ** 0.5
    return (centred / (std + 1e-8)).to(values_R.dtype)


def loss_weights(
    loss_mask_R: Tensor,
    response_lengths_N: Tensor,
    counted_N: Tensor,
    *,
    per_token: bool,
    step_tokens_N: Tensor | None = None,
) -> Tensor:
    """Return each token's weight in the loss of one optimizer step, [R] float64.

    - Per sample (default): mask / (the sample's unmasked tokens) / (samples that count), so the loss is the mean of the
      samples' means.
    - Per token: mask / (unmasked tokens of all samples that count).

    A mask with other values than 0 and 1 gives weighted means: its sum takes the place of the number of tokens.

    A sample counts when its `counted_N` is True and its mask is not all 0. The weights sum to 1, or to 0 when no sample
    counts. Example: two samples with masks [1, 1] and [1, 0, 1, 1] have 2 and 3 unmasked tokens. Per sample the weights
    are 1/4, 1/4 and 1/6, 0, 1/6, 1/6; per token all five are 1/5.

    Args:
        step_tokens_N: `counted_tokens` of all samples of the step, of which these are a part; None: these are all.
    """
    tokens_N = counted_tokens(loss_mask_R, response_lengths_N, counted_N)
    step_tokens_N = tokens_N if step_tokens_N is None else step_tokens_N
    row_R = torch.repeat_interleave(torch.arange(len(response_lengths_N)), response_lengths_N)
    mask_R = loss_mask_R.double() * counted_N[row_R]
    if per_token:
        return mask_R / _or_one(step_tokens_N.sum())
    return mask_R / _or_one(tokens_N)[row_R] / (step_tokens_N > 0).sum().clamp(min=1)


def counted_tokens(loss_mask_R: Tensor, response_lengths_N: Tensor, counted_N: Tensor) -> Tensor:
    """Return the sum of each sample's mask, [N] float64; 0 for a sample that is not counted."""
    row_R = torch.repeat_interleave(torch.arange(len(response_lengths_N)), response_lengths_N)
    return sums_of_rows(loss_mask_R.double() * counted_N[row_R], row_R, len(response_lengths_N))


def _or_one(counts: Tensor) -> Tensor:
    """Return the counts with 1 for 0, so that what has no tokens can be divided by them."""
    return torch.where(counts > 0, counts, 1.0)
