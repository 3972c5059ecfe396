"""RoPE on a GPU: one pass that rotates the first channels of each head and copies the others.

- Used by: `kernels.rotary`, for CUDA tensors.
- Invariant: cosines, sines and products are float32, and the result is rounded once. The backward pass rotates by the
  negative angles; it keeps cosines and sines only.

Shapes: _B tokens, heads of d channels; the first 2 x half channels rotate.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""The pairs of channels that a program rotates."""


@triton.jit
def _turn(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    token_stride,
    head_stride,
    cos_stride,
    num_heads,
    half,
    d,
    DIRECTION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, PAIRS)
    cos = tl.load(cos_ptr + token * cos_stride + pairs, mask=pairs < half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * cos_stride + pairs, mask=pairs < half, other=0.0)[None, :] * DIRECTION
    source = x_ptr + token * token_stride + heads[:, None] * head_stride
    out = out_ptr + token * num_heads * d + heads[:, None] * d
    some = (heads < num_heads)[:, None]
    if INTERLEAVED:
        # one load brings both channels of each pair, because they are neighbours
        channels = tl.arange(0, 2 * PAIRS)[None, :]
        here = some & (channels < 2 * half)
        x = tl.load(source + channels, mask=here, other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))
        y = tl.reshape(tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin), (HEADS, 2 * PAIRS))
        tl.store(out + channels, y.to(out_ptr.dtype.element_ty), mask=here)
    else:
        here = some & (pairs < half)[None, :]
        first = pairs[None, :]
        x1 = tl.load(source + first, mask=here, other=0.0).to(tl.float32)
        x2 = tl.load(source + half + first, mask=here, other=0.0).to(tl.float32)
        tl.store(out + first, (x1 * cos - x2 * sin).to(out_ptr.dtype.element_ty), mask=here)
        tl.store(out + half + first, (x2 * cos + x1 * sin).to(out_ptr.dtype.element_ty), mask=here)
    if REST > 0:
        others = 2 * half + tl.arange(0, REST)
        left = some & (others < d)[None, :]
        tl.store(out + others[None, :], tl.load(source + others[None, :], mask=left), mask=left)


def _rotate(x_B: Tensor, cos_B: Tensor, sin_B: Tensor, interleaved: bool, direction: float) -> Tensor:
    if x_B.stride(-1) != 1:
        x_B = x_B.contiguous()
    num_tokens, num_heads, channels = x_B.shape
    half = cos_B.size(-1)
    assert cos_B.is_contiguous() and sin_B.is_contiguous() and 2 * half <= channels
    out = torch.empty(x_B.shape, dtype=x_B.dtype, device=x_B.device)
    if not out.numel():
        return out
    pairs = triton.next_power_of_2(half)
    heads = min(triton.next_power_of_2(num_heads), max(TILE // pairs, 1))
    rest = channels - 2 * half
    _turn[(num_tokens, triton.cdiv(num_heads, heads))](
        x_B,
        cos_B,
        sin_B,
        out,
        x_B.stride(0),
        x_B.stride(1),
        half,
        num_heads,
        half,
        channels,
        DIRECTION=direction,
        INTERLEAVED=interleaved,
        HEADS=heads,
        PAIRS=pairs,
        REST=triton.next_power_of_2(rest) if rest else 0,
        num_warps=4,
    )
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_B: Tensor, cos_B: Tensor, sin_B: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos_B, sin_B)
        ctx.interleaved = interleaved
        return _rotate(x_B, cos_B, sin_B, interleaved, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        cos_B, sin_B = ctx.saved_tensors
        return _rotate(gradients[0], cos_B, sin_B, ctx.interleaved, -1.0), None, None, None


def rotary(x_B: Tensor, cos_B: Tensor, sin_B: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate x [B, heads, d] by the angles of cos and sin [B, half] float32."""
    return _Rotary.apply(x_B, cos_B, sin_B, interleaved)  # pyright: ignore[reportReturnType]
