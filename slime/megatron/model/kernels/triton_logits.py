"""The sums over a chunk of logits that log-probs need, and the gradient that overwrites the logits, in one pass each.

- Used by: `logprobs`, on the logits [C, V] of one chunk in the dtype of the matrix product.
- Invariant: no copy of the logits is made in another dtype; inside a pass everything is float32.

Shapes: _C response tokens of the chunk, _V this rank's part of the vocabulary.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SUMS_BLOCK, GRADIENT_BLOCK = 8192, 4096
NOTHING = -1.0e30
"""The largest logit of an empty part. It is finite, so that its product with a sum of 0 is 0."""


@triton.jit
def _sums(
    logits_ptr,
    targets_ptr,
    out_ptr,
    num_tokens,
    size,
    row_stride,
    start,
    scale,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * row_stride
    largest = tl.full([], LOWEST, tl.float32)
    exps = tl.zeros([BLOCK], dtype=tl.float32)
    weighted = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        here = columns < size
        x = tl.load(logits + columns, mask=here, other=0.0).to(tl.float32) * scale
        higher = tl.maximum(largest, tl.max(tl.where(here, x, LOWEST), axis=0))
        change = largest - higher
        shrink = tl.exp(change)
        below = tl.where(here, x - higher, 0.0)
        e = tl.where(here, tl.exp(below), 0.0)
        weighted = shrink * (weighted + change * exps) + e * below
        exps = shrink * exps + e
        largest = higher
    target = tl.load(targets_ptr + row) - start
    mine = (target >= 0) & (target < size)
    of_target = tl.load(logits + target, mask=mine, other=0.0).to(tl.float32) * scale
    tl.store(out_ptr + row, largest)
    tl.store(out_ptr + num_tokens + row, tl.sum(exps, axis=0))
    tl.store(out_ptr + 2 * num_tokens + row, tl.sum(weighted, axis=0))
    tl.store(out_ptr + 3 * num_tokens + row, of_target)


@triton.jit
def _gradient(
    logits_ptr,
    targets_ptr,
    log_sums_ptr,
    entropies_ptr,
    gradient_ptr,
    entropy_gradient_ptr,
    size,
    row_stride,
    start,
    scale,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = columns < size
    place = logits_ptr + row * row_stride + columns
    log_p = tl.load(place, mask=here, other=0.0).to(tl.float32) * scale - tl.load(log_sums_ptr + row)
    gradient = tl.load(gradient_ptr + row)
    factor = gradient
    if WITH_ENTROPY:
        factor += tl.load(entropy_gradient_ptr + row) * (log_p + tl.load(entropies_ptr + row))
    # d log p(target) / d logits = onehot - p;  d entropy / d logits = -p (log p + entropy)
    target = tl.load(targets_ptr + row) - start
    of_logits = tl.where(columns == target, gradient, 0.0) - tl.exp(log_p) * factor
    tl.store(place, (of_logits * scale).to(logits_ptr.dtype.element_ty), mask=here)


def sums(logits_CV: Tensor, targets_C: Tensor, start: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduce x = logits x scale to four [C] float32: the largest, sum(e^y), sum(e^y y), and the target's x.

    Here y = x - largest. A target in another rank's part gives 0; an empty part gives NOTHING as its largest.
    """
    num_tokens, size = logits_CV.shape
    out = torch.empty(4, num_tokens, dtype=torch.float32, device=logits_CV.device)
    if num_tokens:
        _sums[(num_tokens,)](
            logits_CV,
            targets_C.contiguous(),
            out,
            num_tokens,
            size,
            logits_CV.stride(0),
            start,
            scale,
            LOWEST=NOTHING,
            BLOCK=SUMS_BLOCK,
            num_warps=8,
        )
    largest_C, exps_C, weighted_C, target_C = out.unbind()
    return largest_C, exps_C, weighted_C, target_C


def gradient_in_place(
    logits_CV: Tensor,
    targets_C: Tensor,
    log_sums_C: Tensor,
    entropies_C: Tensor,
    gradient_C: Tensor,
    entropy_gradient_C: Tensor | None,
    start: int,
    scale: float,
) -> Tensor:
    """Overwrite the logits with their gradient, given those of log-prob and entropy (None: the entropy has none)."""
    num_tokens, size = logits_CV.shape
    gradient_C = gradient_C.contiguous()  # the gradient of a sum is one number, expanded
    if entropy_gradient_C is not None:
        entropy_gradient_C = entropy_gradient_C.contiguous()
    if logits_CV.numel():
        _gradient[(num_tokens, triton.cdiv(size, GRADIENT_BLOCK))](
            logits_CV,
            targets_C.contiguous(),
            log_sums_C.contiguous(),
            entropies_C.contiguous(),
            gradient_C,
            gradient_C if entropy_gradient_C is None else entropy_gradient_C,
            size,
            logits_CV.stride(0),
            start,
            scale,
            WITH_ENTROPY=entropy_gradient_C is not None,
            BLOCK=GRADIENT_BLOCK,
            num_warps=4,
        )
    return logits_CV
