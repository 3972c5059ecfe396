"""The loss on examples that are not trained on, from their log-probs.

- Used by: the training rank, with the log-probs of its own examples that the trainer computes by the current weights.
- Invariant: the result depends on the examples and the weights alone, not on the layout or on micro-batches.
"""

from __future__ import annotations

import numpy as np
import torch

from slime.core.columns import Array
from slime.megatron.share import Share


def validation_losses(share: Share, log_probs_R: Array) -> dict[str, float]:
    """Return the mean of -log p over all trained tokens, and the mean over examples of each example's mean. Collective.

    With weights other than 0 and 1 both are weighted means. Example: of two examples with 1 and 3 trained tokens, whose
    losses are 4 and 0, 0, 0, `loss` is 1 and `loss_per_sample` is 2.

    Args:
        log_probs_R: the log-probs of the rank's own examples.
    """
    own = share.own
    weights_R = own.columns["loss_mask"].astype(np.float64)
    # `where` first: 0 times the infinite loss of a token that is not trained on would be nan
    losses_R = np.where(weights_R > 0, -log_probs_R.astype(np.float64), 0.0) * weights_R
    starts_M = np.cumsum(own.response_lengths_N) - own.response_lengths_N
    sums_N, counts_N = (
        share.all_rows(torch.from_numpy(np.add.reduceat(values_R, starts_M))).numpy()
        for values_R in (losses_R, weights_R)
    )
    return {
        "loss": float(sums_N.sum() / counts_N.sum()),
        "loss_per_sample": float((sums_N / counts_N).mean()),
        "num_examples": float(len(share.rows)),
        "trained_tokens": share.totals((weights_R > 0).sum())[0],
    }
