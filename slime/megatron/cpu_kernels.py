"""RMSNorm and SwiGLU with backward passes written out: fewer passes over memory than autograd's.

Path: `layers` puts them into the model; they run where nothing else fuses these operators, in fp32 on a CPU. Invariant:
outputs and gradients are those of F.rms_norm and of silu(gate) * up, to float32's rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight (arXiv:1910.07467). PyTorch has no fused backward of it on a CPU."""

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
    """silu(gate) * up of [gate | up] (arXiv:2002.05202); the gradient of both is written into one tensor."""

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


def _is_ours(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """F.rms_norm over the last dimension."""
    if _is_ours(x):
        return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]
    return F.rms_norm(x, (x.size(-1),), weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2 F] -> [..., F]."""
    if _is_ours(gate_up):
        return _SwiGLU.apply(gate_up)  # pyright: ignore[reportReturnType]
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
