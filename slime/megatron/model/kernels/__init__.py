"""RMSNorm, SwiGLU and RoPE with one pass over memory each, forward and backward, chosen by device and dtype.

- Used by: `layers` and `attention` call these in every layer.
- Invariant: each function computes the formula in its docstring, whichever kernel runs; Triton is imported only when a
  tensor is on a GPU.

On a GPU everything is computed in float32 and rounded once, at the end. Hugging Face's models differ there: they round
in between. The kernels use no atomics, so the same inputs give the same bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slime.megatron.model.kernels import cpu

LONGEST_NORM = 16384
"""The most channels that one Triton program holds for a norm."""


def _is_cpu_fp32(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467)."""
    if x.is_cuda and x.size(-1) <= LONGEST_NORM:
        from slime.megatron.model.kernels import triton_norm

        return triton_norm.rms_norm(x, weight, eps)
    if _is_cpu_fp32(x):
        return cpu.rms_norm(x, weight, eps)
    return F.rms_norm(x, (x.size(-1),), weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up of [gate | up] (arXiv:2002.05202): [..., 2 F] -> [..., F]."""
    if gate_up.is_cuda and gate_up.numel():  # an expert may have no token, and a kernel needs a block
        from slime.megatron.model.kernels import triton_swiglu

        return triton_swiglu.swiglu(gate_up)
    if _is_cpu_fp32(gate_up):
        return cpu.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotary(x_B: Tensor, cos_B: Tensor, sin_B: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate the first channels of x [B, heads, d] by the angles, and keep the others (RoPE, arXiv:2104.09864).

    Args:
        cos_B, sin_B: [B, r / 2] float32, for r <= d channels.
        interleaved: a pair is two neighbouring channels; otherwise its channels are r / 2 apart.
    """
    if x_B.is_cuda:
        from slime.megatron.model.kernels import triton_rotary

        return triton_rotary.rotary(x_B, cos_B, sin_B, interleaved=interleaved)
    return cpu.rotary(x_B, cos_B, sin_B, interleaved=interleaved)
