"""Sums of a few rows for each token on a GPU, read where they are: no copy of the rows in another order is made.

- Used by: `kernels.row_sums`, for CUDA tensors.
- Invariant: sums are float32 and rounded once, in the order of the given rows, without atomics.

Shapes: t tokens of K rows each, N rows of H channels.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _sums(rows_ptr, rows_of_ptr, out_ptr, H, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = columns < H
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(rows_of_ptr + token * K + k)
        total += tl.load(rows_ptr + row * H + columns, mask=here, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * H + columns, total.to(out_ptr.dtype.element_ty), mask=here)


def row_sums(rows: Tensor, rows_of: Tensor) -> Tensor:
    """Add up rows [N, H] for each token, those that `rows_of` [t, K] int64 names: [t, H]."""
    rows, rows_of = rows.contiguous(), rows_of.contiguous()
    (tokens, k), channels = rows_of.shape, rows.size(1)
    out = torch.empty((tokens, channels), dtype=rows.dtype, device=rows.device)
    if out.numel():
        _sums[(tokens, triton.cdiv(channels, BLOCK))](rows, rows_of, out, channels, K=k, BLOCK=BLOCK, num_warps=4)
    return out
