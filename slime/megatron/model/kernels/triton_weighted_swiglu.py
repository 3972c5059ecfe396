"""SwiGLU times a weight for each row on a GPU: the gate of experts, whose outputs the router weights.

- Used by: `kernels.weighted_swiglu`, for CUDA tensors.
- Invariant: everything between load and store is float32, so results are rounded once. The backward pass keeps the
  inputs only, and adds up a row's products in one program, without atomics.

Shapes: N rows of 2 F channels, gate then up, next to each other in memory.
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
def _forward(gate_up_ptr, weights_ptr, out_ptr, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = columns < F
    weight = tl.load(weights_ptr + row).to(tl.float32)
    gate = tl.load(gate_up_ptr + row * 2 * F + columns, mask=here, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * F + F + columns, mask=here, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up * weight
    tl.store(out_ptr + row * F + columns, out.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _backward(
    gate_up_ptr, weights_ptr, gradient_ptr, of_gate_up_ptr, of_weights_ptr, F, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights_ptr + row).to(tl.float32)
    products = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in tl.static_range(BLOCKS):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        here = columns < F
        gate = tl.load(gate_up_ptr + row * 2 * F + columns, mask=here, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + row * 2 * F + F + columns, mask=here, other=0.0).to(tl.float32)
        gradient = tl.load(gradient_ptr + row * F + columns, mask=here, other=0.0).to(tl.float32)
        share = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * share
        products += gradient * silu * up
        # d silu / d gate = share (1 + gate (1 - share))
        of_gate = gradient * weight * up * share * (1.0 + gate * (1.0 - share))
        of_up = gradient * weight * silu
        out = of_gate_up_ptr + row * 2 * F + columns
        tl.store(out, of_gate.to(of_gate_up_ptr.dtype.element_ty), mask=here)
        tl.store(out + F, of_up.to(of_gate_up_ptr.dtype.element_ty), mask=here)
    tl.store(of_weights_ptr + row, tl.sum(products, axis=0))


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor) -> Tensor:
        gate_up, weights = gate_up.contiguous(), weights.contiguous()
        rows, channels = gate_up.size(0), gate_up.size(1) // 2
        out = gate_up.new_empty(rows, channels)
        if out.numel():
            grid = (rows, triton.cdiv(channels, BLOCK))
            _forward[grid](gate_up, weights, out, channels, BLOCK=BLOCK, num_warps=4)
        ctx.save_for_backward(gate_up, weights)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, weights = ctx.saved_tensors
        rows, channels = gate_up.size(0), gate_up.size(1) // 2
        of_gate_up, of_weights = torch.empty_like(gate_up), torch.empty_like(weights)
        if of_gate_up.numel():
            _backward[(rows,)](
                gate_up,
                weights,
                gradients[0].contiguous(),
                of_gate_up,
                of_weights,
                channels,
                BLOCKS=triton.cdiv(channels, BLOCK),
                BLOCK=BLOCK,
                num_warps=4,
            )
        return of_gate_up, of_weights


def weighted_swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    """Return silu(gate) * up * weight: [N, 2 F] and [N] float32 -> [N, F]."""
    return _WeightedSwiGLU.apply(gate_up, weights)  # pyright: ignore[reportReturnType]
