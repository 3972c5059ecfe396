"""Sums over whole responses, for losses that need more than one token at a time.

- Used by: `megatron.microbatch` makes one for each micro-batch, and the loss reads it as `LossInputs.sequences`.
- Invariant: the result does not depend on which ranks hold a response. With context parallelism several ranks hold
  parts of one response; the subclass for that case is in `megatron.microbatch`.

_M: the rows of the micro-batch. _R: those of their response tokens that this rank holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Maps each token to its response, and sums over responses. All sums are differentiable."""

    row_R: Tensor
    """int64, the row of each token, below `num_rows`."""
    num_rows: int

    def sum_of(self, values_R: Tensor, mask_R: Tensor) -> Tensor:
        """Return [R]: for each token, the sum of the values over its whole response where the mask is not 0."""
        kept_R = torch.where(mask_R != 0, values_R, 0.0)
        return self.total(values_R.new_zeros(self.num_rows).index_add(0, self.row_R, kept_R))[self.row_R]

    def mean_of(self, values_R: Tensor, mask_R: Tensor) -> Tensor:
        """Return [R]: for each token, the mean over its whole response; 0 for a response whose mask is empty."""
        counts_R = self.sum_of(torch.ones_like(values_R), mask_R)
        return self.sum_of(values_R, mask_R) / counts_R.clamp(min=1)

    def total(self, sums_M: Tensor) -> Tensor:
        """Add the other ranks' parts to each row's sum, [M] -> [M]; here each rank holds whole responses."""
        return sums_M
