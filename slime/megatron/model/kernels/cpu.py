"""RMSNorm, SwiGLU and RoPE on a CPU, with explicit backward passes that read memory less often than autograd's.

- Used by: the package chooses these by device and dtype; RMSNorm and SwiGLU in fp32, where nothing else fuses them.
- Invariant: outputs and gradients equal those of F.rms_norm, of silu(gate) * up and of the rotation, up to float32's
  rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight (arXiv:1910.07467), because PyTorch has no fused backward of it on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        norms = torch.linalg.vector_norm(rows, dim=1)
        inverse_rms = norms.square_().div_(rows.size(1)).add_(eps).rsqrt_()
        normed = rows * inverse_rms[:, None]
        ctx.save_for_backward(normed, weight, inverse_rms)
        return (normed * weight).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, weight, inverse_rms = ctx.saved_tensors
        gradient = gradients[0].reshape(normed.shape)
        products = gradient * normed
        # d x = (g w - normed * mean(g w normed)) / rms
        means = torch.mv(products, weight).div_(normed.size(1))
        of_x = (gradient * weight).addcmul_(normed, means[:, None], value=-1).mul_(inverse_rms[:, None])
        return of_x.view(gradients[0].shape), products.sum(0), None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [gate | up] (arXiv:2002.05202), with the gradient of both in one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        of_gate, of_up = result.chunk(2, dim=-1)
        torch.mul(gradients[0], activated, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * up, gate, grad_input=of_gate)
        return result


def _rotate(x_B: Tensor, cos_B: Tensor, sin_B: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first 2 x cos.size(-1) channels, in neighbouring pairs or in pairs that are half of them apart."""
    half = cos_B.size(-1)
    rotated = x_B.clone(memory_format=torch.contiguous_format)
    turning = rotated[..., : 2 * half]
    if interleaved and x_B.dtype == torch.float32:
        pairs = torch.view_as_complex(turning.unflatten(-1, (half, 2)))
        pairs.mul_(torch.complex(cos_B, sin_B)[:, None])  # in one pass
        return rotated
    x1, x2 = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    cos, sin = cos_B[:, None].to(x_B.dtype), sin_B[:, None].to(x_B.dtype)
    into_second = x1 * sin
    x1.mul_(cos).addcmul_(x2, sin, value=-1)
    x2.mul_(cos).add_(into_second)
    return rotated


class _Rotary(torch.autograd.Function):
    """RoPE (arXiv:2104.09864); its backward pass rotates by the negative angles."""

    @staticmethod
    def forward(ctx: Any, x_B: Tensor, cos_B: Tensor, sin_B: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos_B, sin_B)
        ctx.interleaved = interleaved
        return _rotate(x_B, cos_B, sin_B, interleaved)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        cos_B, sin_B = ctx.saved_tensors
        return _rotate(gradients[0], cos_B, -sin_B, ctx.interleaved), None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return F.rms_norm over the last dimension."""
    return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up: [..., 2 F] -> [..., F]."""
    return _SwiGLU.apply(gate_up)  # pyright: ignore[reportReturnType]


def rotary(x_B: Tensor, cos_B: Tensor, sin_B: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate x [B, heads, d] by the angles of cos and sin [B, rotary channels / 2]."""
    return _Rotary.apply(x_B, cos_B, sin_B, interleaved)  # pyright: ignore[reportReturnType]
