"""RMSNorm on a GPU: one pass forward, one backward, and the weight's gradient by partial sums in a fixed order.

- Used by: `kernels.rms_norm`, for CUDA tensors.
- Invariant: everything between load and store is float32, so the output and the input's gradient are rounded once. The
  backward pass keeps x, weight and 1 / rms of each row (float32), nothing else.

Rows need not be contiguous: q and k norms get heads that are slices of a wider tensor, which is not copied.

Shapes: _N rows of D channels; rows = outer x inner, with a stride for each.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""The elements that a program holds at once; a longer row gets a program of its own."""
MOST_PROGRAMS = 512
"""The most programs of the backward pass; each sums the weight's gradient over its own rows."""


@triton.jit
def _forward(
    x_ptr,
    weight_ptr,
    out_ptr,
    rstd_ptr,
    num_rows,
    inner,
    outer_stride,
    inner_stride,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    here = (rows < num_rows)[:, None] & (columns < D)[None, :]
    starts = (rows // inner) * outer_stride + (rows % inner) * inner_stride
    x = tl.load(x_ptr + starts[:, None] + columns[None, :], mask=here, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    out = x * rstd[:, None] * weight[None, :]
    tl.store(out_ptr + rows[:, None] * D + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=here)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit
def _backward(
    x_ptr,
    weight_ptr,
    rstd_ptr,
    gradient_ptr,
    of_x_ptr,
    partial_ptr,
    num_rows,
    inner,
    outer_stride,
    inner_stride,
    tiles_of_program,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    of_weight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for tile in range(tiles_of_program):
        rows = (program * tiles_of_program + tile) * ROWS + tl.arange(0, ROWS)
        here = (rows < num_rows)[:, None] & (columns < D)[None, :]
        starts = (rows // inner) * outer_stride + (rows % inner) * inner_stride
        x = tl.load(x_ptr + starts[:, None] + columns[None, :], mask=here, other=0.0).to(tl.float32)
        flat = rows[:, None] * D + columns[None, :]
        gradient = tl.load(gradient_ptr + flat, mask=here, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        normed = x * rstd[:, None]
        weighted = gradient * weight[None, :]
        mean = tl.sum(normed * weighted, axis=1) / D
        of_x = (weighted - normed * mean[:, None]) * rstd[:, None]
        tl.store(of_x_ptr + flat, of_x.to(of_x_ptr.dtype.element_ty), mask=here)
        of_weight += gradient * normed
    tl.store(partial_ptr + program * D + columns, tl.sum(of_weight, axis=0), mask=columns < D)


def _rows_of(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Return x with rows at (outer, inner) strides, its inner size and both strides; copy only if rows have none."""
    channels = x.size(-1)
    if x.is_contiguous() or x.stride(-1) != 1 or x.dim() < 2:
        return x.contiguous(), 1, channels, 0
    parts = x.reshape(-1, x.size(-2), channels)
    return parts, x.size(-2), parts.stride(0), parts.stride(1)


def _blocks(channels: int) -> tuple[int, int, int]:
    """Return the rows of a tile, the channels with padding, and the number of warps."""
    block = max(triton.next_power_of_2(channels), 16)
    rows = max(TILE // block, 1)
    return rows, block, min(max(rows * block // 1024, 4), 16)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        channels = x.size(-1)
        num_rows = x.numel() // channels
        source, inner, outer_stride, inner_stride = _rows_of(x)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rstd_N = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        rows, block, warps = _blocks(channels)
        if num_rows:
            _forward[(triton.cdiv(num_rows, rows),)](
                source,
                weight,
                out,
                rstd_N,
                num_rows,
                inner,
                outer_stride,
                inner_stride,
                eps,
                D=channels,
                ROWS=rows,
                BLOCK=block,
                num_warps=warps,
            )
        ctx.save_for_backward(x, weight, rstd_N)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd_N = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        channels, num_rows = x.size(-1), len(rstd_N)
        source, inner, outer_stride, inner_stride = _rows_of(x)
        of_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if not num_rows:
            return of_x, torch.zeros_like(weight), None
        rows, block, warps = _blocks(channels)
        tiles = triton.cdiv(num_rows, rows)
        tiles_of_program = triton.cdiv(tiles, MOST_PROGRAMS)
        programs = triton.cdiv(tiles, tiles_of_program)
        partial = torch.empty(programs, channels, dtype=torch.float32, device=x.device)
        _backward[(programs,)](
            source,
            weight,
            rstd_N,
            gradient,
            of_x,
            partial,
            num_rows,
            inner,
            outer_stride,
            inner_stride,
            tiles_of_program,
            D=channels,
            ROWS=rows,
            BLOCK=block,
            num_warps=warps,
        )
        return of_x, partial.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize x [..., D] with weight [D]; the result has x's dtype."""
    return _RMSNorm.apply(x, weight.contiguous(), eps)  # pyright: ignore[reportReturnType]
