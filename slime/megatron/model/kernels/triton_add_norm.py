"""A sub-layer's output joins the residual stream on a GPU: its own norm, the sum, and the next norm in one pass.

- Used by: `kernels.add_and_norm`, for CUDA tensors.
- Invariant: everything between load and store is float32. The sum is rounded once, and the next norm reads the rounded
  sum, which is what the backward pass reads, too. Weight gradients are partial sums in a fixed order: the same inputs
  give the same bits.

    x -> [norm, weight `own`] -> + residual -> sum h -> [norm, weight `following`] -> y

Either norm may be left out. The backward pass keeps h and, for the first norm, x; it computes 1 / rms again.

Shapes: _N rows of D channels.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, BACKWARD_TILE = 4096, 1024
"""The channels that a program holds at once; a longer row gets a program of its own."""
SUMS = 2**20
"""The most partial sums of one weight's gradient. Each program of the backward pass has a row of them, for its rows."""


@triton.jit(do_not_specialize=["num_rows"])
def _forward(
    x_ptr,
    residual_ptr,
    own_ptr,
    following_ptr,
    sum_ptr,
    out_ptr,
    num_rows,
    eps,
    OWN: tl.constexpr,
    FOLLOWING: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    here = (rows < num_rows)[:, None] & (columns < D)[None, :]
    at = rows[:, None] * D + columns[None, :]
    x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + at, mask=here, other=0.0).to(tl.float32)
    if OWN:
        weight = tl.load(own_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
        x = x * rstd[:, None] * weight[None, :]
    total = (residual + x).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + at, total, mask=here)
    if FOLLOWING:
        h = total.to(tl.float32)
        weight2 = tl.load(following_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
        rstd2 = 1.0 / tl.sqrt(tl.sum(h * h, axis=1) / D + eps)
        out = h * rstd2[:, None] * weight2[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["num_rows", "tiles_of_program"])
def _backward(
    x_ptr,
    sum_ptr,
    own_ptr,
    following_ptr,
    of_sum_ptr,
    of_out_ptr,
    of_residual_ptr,
    of_x_ptr,
    own_sums_ptr,
    following_sums_ptr,
    num_rows,
    tiles_of_program,
    eps,
    OWN: tl.constexpr,
    FOLLOWING: tl.constexpr,
    OF_SUM: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    if OWN:
        own = tl.load(own_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    if FOLLOWING:
        following = tl.load(following_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    of_own = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    of_following = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for tile in range(tiles_of_program):
        rows = (program * tiles_of_program + tile) * ROWS + tl.arange(0, ROWS)
        here = (rows < num_rows)[:, None] & (columns < D)[None, :]
        at = rows[:, None] * D + columns[None, :]
        gradient = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        if OF_SUM:
            gradient = tl.load(of_sum_ptr + at, mask=here, other=0.0).to(tl.float32)
        if FOLLOWING:
            h = tl.load(sum_ptr + at, mask=here, other=0.0).to(tl.float32)
            of_out = tl.load(of_out_ptr + at, mask=here, other=0.0).to(tl.float32)
            rstd2 = (1.0 / tl.sqrt(tl.sum(h * h, axis=1) / D + eps))[:, None]
            normed2 = h * rstd2
            of_following += of_out * normed2
            weighted2 = of_out * following
            mean2 = (tl.sum(h * weighted2, axis=1) / D)[:, None] * rstd2
            gradient += (weighted2 - normed2 * mean2) * rstd2
            tl.store(of_residual_ptr + at, gradient.to(of_residual_ptr.dtype.element_ty), mask=here)
        if OWN:
            x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
            rstd1 = (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps))[:, None]
            normed1 = x * rstd1
            of_own += gradient * normed1
            weighted1 = gradient * own
            mean1 = (tl.sum(x * weighted1, axis=1) / D)[:, None] * rstd1
            of_x = (weighted1 - normed1 * mean1) * rstd1
            tl.store(of_x_ptr + at, of_x.to(of_x_ptr.dtype.element_ty), mask=here)
    if OWN:
        tl.store(own_sums_ptr + program * D + columns, tl.sum(of_own, axis=0), mask=columns < D)
    if FOLLOWING:
        tl.store(following_sums_ptr + program * D + columns, tl.sum(of_following, axis=0), mask=columns < D)


def _blocks(channels: int, tile: int) -> tuple[int, int]:
    """Return the rows of a tile, and the channels with padding."""
    block = max(triton.next_power_of_2(channels), 16)
    return max(tile // block, 1), block


def _backward_warps(channels: int, own: bool, following: bool) -> int:
    """Return the warps of a backward program that holds so many channels.

    Both norms wait for each other's sums over a row, and few warps wait less: 0.16 ms instead of 0.24 for 8,192 rows of
    4,096 channels on an H200.
    """
    return 4 if own and following else min(max(channels // 256, 4), 16)


class _AddAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, own: Tensor | None, following: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        channels = x.size(-1)
        num_rows = x.numel() // channels
        total = torch.empty_like(x)
        out = None if following is None else torch.empty_like(x)
        rows, block = _blocks(channels, TILE)
        if num_rows:
            _forward[(triton.cdiv(num_rows, rows),)](
                x,
                residual,
                x if own is None else own,
                x if following is None else following,
                total,
                total if out is None else out,
                num_rows,
                eps,
                OWN=own is not None,
                FOLLOWING=following is not None,
                D=channels,
                ROWS=rows,
                BLOCK=block,
                num_warps=min(max(rows * block // 1024, 4), 16),
            )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(None if own is None else x, own, None if following is None else total, following)
        ctx.eps = eps
        return total, out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, own, total, following = ctx.saved_tensors
        of_sum, of_out = (None if gradient is None else gradient.contiguous() for gradient in gradients)
        given = of_out if of_sum is None else of_sum
        if given is None:
            return None, None, None, None, None
        if of_out is None:  # nothing has read the second result
            following = None
        # without a norm after it, the sum's gradient is the residual stream's
        of_residual = given if following is None else torch.empty_like(given)
        of_x = of_residual if own is None else torch.empty_like(given)
        channels = given.size(-1)
        num_rows = given.numel() // channels
        rows, block = _blocks(channels, BACKWARD_TILE)
        tiles = triton.cdiv(num_rows, rows)
        tiles_of_program = max(triton.cdiv(tiles, max(SUMS // block, 1)), 1)
        programs = triton.cdiv(tiles, tiles_of_program)
        of_own, of_following = (
            None if weight is None else torch.empty(programs, channels, dtype=torch.float32, device=given.device)
            for weight in (own, following)
        )
        if num_rows:
            _backward[(programs,)](
                given if x is None else x,
                given if total is None else total,
                given if own is None else own,
                given if following is None else following,
                given,
                given if of_out is None else of_out,
                of_residual,
                of_x,
                given if of_own is None else of_own,
                given if of_following is None else of_following,
                num_rows,
                tiles_of_program,
                ctx.eps,
                OWN=own is not None,
                FOLLOWING=following is not None,
                OF_SUM=of_sum is not None,
                D=channels,
                ROWS=rows,
                BLOCK=block,
                num_warps=_backward_warps(rows * block, own is not None, following is not None),
            )
        return (
            of_x,
            of_residual,
            None if of_own is None else of_own.sum(0).to(given.dtype),
            None if of_following is None else of_following.sum(0).to(given.dtype),
            None,
        )


def add_and_norm(
    x: Tensor, residual: Tensor, own: Tensor | None, following: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Return h = residual + x, and its norm with weight `following` [D], both as [..., D] in x's dtype.

    With a weight `own` [D], x is normed before it is added. Without `following` there is no second result.
    """
    assert x.shape == residual.shape and x.dtype == residual.dtype
    own, following = (None if weight is None else weight.contiguous() for weight in (own, following))
    return _AddAndNorm.apply(  # pyright: ignore[reportReturnType]
        x.contiguous(), residual.contiguous(), own, following, eps
    )
