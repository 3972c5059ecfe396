"""SwiGLU on a GPU: it reads both halves where they are in memory, and writes both gradients into one tensor.

- Used by: `kernels.swiglu`, for CUDA tensors.
- Invariant: everything between load and store is float32, so results are rounded once. The backward pass keeps the
  input only.

Shapes: _N rows of 2 F channels, gate then up.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _forward(gate_up_ptr, out_ptr, row_stride, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = columns < F
    gate = tl.load(gate_up_ptr + row * row_stride + columns, mask=here, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + F + columns, mask=here, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * F + columns, out.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _backward(gate_up_ptr, gradient_ptr, of_gate_up_ptr, row_stride, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = columns < F
    gate = tl.load(gate_up_ptr + row * row_stride + columns, mask=here, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + F + columns, mask=here, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_ptr + row * F + columns, mask=here, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * share
    # d silu / d gate = share (1 + gate (1 - share))
    of_gate = gradient * up * share * (1.0 + gate * (1.0 - share))
    of_up = gradient * silu
    out = of_gate_up_ptr + row * 2 * F + columns
    tl.store(out, of_gate.to(of_gate_up_ptr.dtype.element_ty), mask=here)
    tl.store(out + F, of_up.to(of_gate_up_ptr.dtype.element_ty), mask=here)


def _rows_of(gate_up: Tensor) -> Tensor:
    """Return [N, 2 F] with neighbouring channels, without a copy if possible."""
    rows = gate_up.reshape(-1, gate_up.size(-1))
    return rows if rows.stride(-1) == 1 or not rows.numel() else rows.contiguous()


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        rows = _rows_of(gate_up)
        half = rows.size(1) // 2
        out = torch.empty((*gate_up.shape[:-1], half), dtype=gate_up.dtype, device=gate_up.device)
        if out.numel():
            grid = (len(rows), triton.cdiv(half, BLOCK))
            _forward[grid](rows, out, rows.stride(0), half, BLOCK=BLOCK, num_warps=4)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        rows = _rows_of(gate_up)
        half = rows.size(1) // 2
        of_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        if of_gate_up.numel():
            grid = (len(rows), triton.cdiv(half, BLOCK))
            gradient = gradients[0].contiguous()
            _backward[grid](rows, gradient, of_gate_up, rows.stride(0), half, BLOCK=BLOCK, num_warps=4)
        return of_gate_up


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up: [..., 2 F] -> [..., F]."""
    return _SwiGLU.apply(gate_up)  # pyright: ignore[reportReturnType]
