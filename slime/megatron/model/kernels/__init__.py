"""Norms, SwiGLU, RoPE and what is between two matrix products, in one pass over memory, chosen by device and dtype.

- Used by: `layer`, `layers`, `attention` and `moe` call these in every layer.
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


def weighted_swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    """Return silu(gate) * up * weight of [gate | up]: [N, 2 F] and a float32 weight of each row [N] -> [N, F]."""
    if gate_up.is_cuda and gate_up.numel():
        from slime.megatron.model.kernels import triton_weighted_swiglu

        return triton_weighted_swiglu.weighted_swiglu(gate_up, weights)
    hidden = swiglu(gate_up)
    return (hidden * weights[:, None]).to(hidden.dtype)


def row_sums(rows: Tensor, rows_of: Tensor) -> Tensor:
    """Add up rows [N, H] for each token, those that `rows_of` [t, K] int64 names: [t, H]. It has no gradient."""
    if rows.is_cuda:
        from slime.megatron.model.kernels import triton_row_sums

        return triton_row_sums.row_sums(rows, rows_of)
    return rows.index_select(0, rows_of.flatten()).unflatten(0, rows_of.shape).sum(1)


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


def split_heads(
    mixed_B: Tensor,
    cos_B: Tensor,
    sin_B: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    *,
    num_heads: int,
    num_groups: int,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the QKV projection's output [B, (h + 2 g) d] into q [B, h, d], k and v [B, g, d]; norm and rotate q and k.

    A row has the query heads of the first group, their key and value, then those of the second group, and so on.

    Args:
        cos_B, sin_B: [B, r / 2] float32, for r <= d channels; see `rotary`.
        weights: [d] each, of the norms of queries and of keys; None without norms.
        interleaved: see `rotary`.
    """
    if mixed_B.is_cuda:
        from slime.megatron.model.kernels import triton_qkv

        return triton_qkv.split_heads(
            mixed_B,
            cos_B,
            sin_B,
            weights,
            num_heads=num_heads,
            num_groups=num_groups,
            eps=eps,
            interleaved=interleaved,
        )
    channels = mixed_B.size(-1) // (num_heads + 2 * num_groups)
    groups = mixed_B.view(len(mixed_B), num_groups, -1, channels)
    q, k, v = groups.split([num_heads // num_groups, 1, 1], dim=2)
    q, k, v = q.reshape(len(mixed_B), num_heads, channels), k.squeeze(2), v.squeeze(2)
    if weights is not None:
        q, k = (rms_norm(x, weight, eps) for x, weight in zip((q, k), weights, strict=True))
    q, k = (rotary(x, cos_B, sin_B, interleaved=interleaved) for x in (q, k))
    return q, k, v


def add_and_norm(
    x: Tensor, residual: Tensor, own: Tensor | None, following: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Add a sub-layer's output to the residual stream: return h = residual + x, and the norm of h.

    Args:
        x, residual: [..., D] of one dtype.
        own: [D] the weight of a norm of x before the sum; None without.
        following: [D] the weight of the norm of h; None: the second result is None.
    """
    if x.is_cuda and x.size(-1) <= LONGEST_NORM:
        from slime.megatron.model.kernels import triton_add_norm

        return triton_add_norm.add_and_norm(x, residual, own, following, eps)
    total = residual + (x if own is None else rms_norm(x, own, eps))
    return total, None if following is None else rms_norm(total, following, eps)
