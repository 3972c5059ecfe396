"""Sequences: sums over whole responses, for losses that need more than one token at a time.

Path: `megatron.microbatch` makes one for each micro-batch, `LossInputs.sequences` hands it to the loss. Invariant: what
comes back does not depend on which ranks hold a response: the form for context parallelism, where several ranks hold
one, stands in `megatron.microbatch`.

Shapes: _M rows of the micro-batch, _R response tokens of them that are here, flat.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Whose each token is. Everything is differentiable."""

    row_R: Tensor
    """int64, below `num_rows`."""
    num_rows: int

    def sum_of(self, values_R: Tensor, mask_R: Tensor) -> Tensor:
        """[R]: the sum over all tokens of the same response where the mask is not 0, on each of its tokens."""
        kept_R = torch.where(mask_R != 0, values_R, 0.0)
        return self.total(values_R.new_zeros(self.num_rows).index_add(0, self.row_R, kept_R))[self.row_R]

    def mean_of(self, values_R: Tensor, mask_R: Tensor) -> Tensor:
        """[R]: the same, as a mean; 0 for a response whose mask is empty."""
        counts_R = self.sum_of(torch.ones_like(values_R), mask_R)
        return self.sum_of(values_R, mask_R) / counts_R.clamp(min=1)

    def total(self, sums_M: Tensor) -> Tensor:
        """[M]: sums over this rank's tokens -> sums over all."""
        return sums_M
