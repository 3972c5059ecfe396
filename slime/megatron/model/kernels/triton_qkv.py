"""Queries, keys and values from the output of the QKV projection on a GPU: split, RMSNorm and RoPE in one pass.

- Used by: `kernels.split_heads`, for CUDA tensors.
- Invariant: everything between load and store is float32, so q, k, v and the gradient of the projection's output are
  rounded once. The norms' weight gradients are partial sums in a fixed order: the same inputs give the same bits.

Without norms the backward pass keeps cosines and sines only; with norms it also keeps the projection's output, which it
reads again instead of keeping 1 / rms. It writes the gradient of the whole output into one tensor.

A token's row has, for each group of query heads, its query heads, its key and its value. With 4 heads in 2 groups it is
q0 q1 k0 v0 q2 q3 k1 v1; `_start` returns the place of a head.

Shapes: _B tokens; h query heads, g groups, d channels of a head, of which the first 2 x half rotate.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slime.megatron.model.kernels.triton_heads import store_sums, turn, turn_back

TILE = 4096
"""The most channels that a program holds at once; it takes the query heads of a token in several turns if necessary."""
MOST_PROGRAMS = 15 * 132
"""The most programs of a backward pass with norms; each sums the weights' gradients over its own tokens.

An H200 has 132 processors, which hold 2 to 5 of them at a time. So all are busy until the end.
"""


@triton.jit
def _start(head, OF_GROUP: tl.constexpr, D: tl.constexpr):
    """Return the place of a query head in a token's row."""
    return (head // OF_GROUP * (OF_GROUP + 2) + head % OF_GROUP) * D


@triton.jit(do_not_specialize=["num_tokens"])
def _forward(
    mixed_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    num_tokens,
    eps,
    H: tl.constexpr,
    OF_GROUP: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    G: tl.constexpr = H // OF_GROUP
    token = tl.program_id(0).to(tl.int64)
    row = mixed_ptr + token * (G * (OF_GROUP + 2) * D)
    pairs = tl.arange(0, PAIRS)[None, :]
    cos = tl.load(cos_ptr + token * HALF + pairs, mask=pairs < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + pairs, mask=pairs < HALF, other=0.0)
    for begin in range(0, H, HEADS):
        head = begin + tl.arange(0, HEADS)[:, None]
        source = row + _start(head, OF_GROUP, D)
        out = q_ptr + token * (H * D) + head * D
        turn(
            source, out, head < H, q_weight_ptr, cos, sin, eps, D, HALF, INTERLEAVED, NORM, HEADS, PAIRS, REST
        )  # fmt: skip
    for begin in range(0, G, GROUPS):
        group = begin + tl.arange(0, GROUPS)[:, None]
        of_key = row + (group * (OF_GROUP + 2) + OF_GROUP) * D
        out = token * (G * D) + group * D
        turn(
            of_key, k_ptr + out, group < G, k_weight_ptr, cos, sin, eps, D, HALF, INTERLEAVED, NORM, GROUPS, PAIRS, REST
        )  # fmt: skip
        channels = tl.arange(0, BLOCK)[None, :]
        here = (group < G) & (channels < D)
        tl.store(v_ptr + out + channels, tl.load(of_key + D + channels, mask=here), mask=here)


@triton.jit(do_not_specialize=["num_tokens", "tokens_of_program"])
def _backward(
    mixed_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    of_q_ptr,
    of_k_ptr,
    of_v_ptr,
    of_mixed_ptr,
    sums_ptr,
    num_tokens,
    tokens_of_program,
    eps,
    H: tl.constexpr,
    OF_GROUP: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    G: tl.constexpr = H // OF_GROUP
    ROW: tl.constexpr = G * (OF_GROUP + 2) * D
    SOME_REST: tl.constexpr = REST if REST > 0 else 1
    program = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, PAIRS)[None, :]
    of_q1 = tl.zeros([HEADS, PAIRS], dtype=tl.float32)
    of_q2 = tl.zeros([HEADS, PAIRS], dtype=tl.float32)
    of_q3 = tl.zeros([HEADS, SOME_REST], dtype=tl.float32)
    of_k1 = tl.zeros([GROUPS, PAIRS], dtype=tl.float32)
    of_k2 = tl.zeros([GROUPS, PAIRS], dtype=tl.float32)
    of_k3 = tl.zeros([GROUPS, SOME_REST], dtype=tl.float32)
    for step in range(tokens_of_program):
        token = program * tokens_of_program + step
        exists = token < num_tokens
        turns = exists & (pairs < HALF)
        cos = tl.load(cos_ptr + token * HALF + pairs, mask=turns, other=0.0)
        sin = tl.load(sin_ptr + token * HALF + pairs, mask=turns, other=0.0)
        for begin in range(0, H, HEADS):
            head = begin + tl.arange(0, HEADS)[:, None]
            place = token * ROW + _start(head, OF_GROUP, D)
            of_q1, of_q2, of_q3 = turn_back(
                of_q_ptr + token * (H * D) + head * D, mixed_ptr + place, of_mixed_ptr + place, (head < H) & exists,
                q_weight_ptr, cos, sin, eps, of_q1, of_q2, of_q3, D, HALF, INTERLEAVED, NORM, HEADS, PAIRS, REST
            )  # fmt: skip
        for begin in range(0, G, GROUPS):
            group = begin + tl.arange(0, GROUPS)[:, None]
            place = token * ROW + (group * (OF_GROUP + 2) + OF_GROUP) * D
            given = token * (G * D) + group * D
            of_k1, of_k2, of_k3 = turn_back(
                of_k_ptr + given, mixed_ptr + place, of_mixed_ptr + place, (group < G) & exists,
                k_weight_ptr, cos, sin, eps, of_k1, of_k2, of_k3, D, HALF, INTERLEAVED, NORM, GROUPS, PAIRS, REST
            )  # fmt: skip
            channels = tl.arange(0, BLOCK)[None, :]
            here = (group < G) & (channels < D) & exists
            of_value = tl.load(of_v_ptr + given + channels, mask=here)
            tl.store(of_mixed_ptr + place + D + channels, of_value, mask=here)
    if NORM:
        sums = sums_ptr + program * (2 * D)
        store_sums(sums, of_q1, of_q2, of_q3, D, HALF, INTERLEAVED, PAIRS, REST)
        store_sums(sums + D, of_k1, of_k2, of_k3, D, HALF, INTERLEAVED, PAIRS, REST)


def _power_of_2(most: int) -> int:
    """Return the largest power of 2 that is at most `most`, but at least 1."""
    return 1 << max(most.bit_length() - 1, 0)


@dataclass(frozen=True)
class _Sizes:
    """The sizes of one projection's output."""

    num_heads: int
    num_groups: int
    channels: int
    half: int
    interleaved: bool

    def constants(self, *, norm: bool) -> dict[str, Any]:
        """Return the constants for which a kernel is compiled."""
        pairs = triton.next_power_of_2(self.half)
        rest = self.channels - 2 * self.half
        others = triton.next_power_of_2(rest) if rest else 0
        most = _power_of_2(TILE // (2 * pairs + others))
        heads = min(triton.next_power_of_2(self.num_heads), most)
        return {
            "H": self.num_heads,
            "OF_GROUP": self.num_heads // self.num_groups,
            "D": self.channels,
            "HALF": self.half,
            "INTERLEAVED": self.interleaved,
            "NORM": norm,
            "HEADS": heads,
            "GROUPS": min(triton.next_power_of_2(self.num_groups), most),
            "PAIRS": pairs,
            "REST": others,
            "BLOCK": triton.next_power_of_2(self.channels),
            "num_warps": min(_power_of_2(heads * (2 * pairs + others) // 512), 8),
        }


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed_B: Tensor,
        cos_B: Tensor,
        sin_B: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        sizes: _Sizes,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens, channels = mixed_B.size(0), sizes.channels
        q_B, k_B, v_B = (
            torch.empty(num_tokens, heads, channels, dtype=mixed_B.dtype, device=mixed_B.device)
            for heads in (sizes.num_heads, sizes.num_groups, sizes.num_groups)
        )
        norm = q_weight is not None and k_weight is not None
        if num_tokens:
            _forward[(num_tokens,)](
                mixed_B,
                cos_B,
                sin_B,
                q_weight if norm else cos_B,
                k_weight if norm else cos_B,
                q_B,
                k_B,
                v_B,
                num_tokens,
                eps,
                **sizes.constants(norm=norm),
            )
        ctx.save_for_backward(cos_B, sin_B, *((mixed_B, q_weight, k_weight) if norm else ()))
        ctx.shape, ctx.sizes, ctx.eps = mixed_B.shape, sizes, eps
        return q_B, k_B, v_B

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        cos_B, sin_B, *normed = ctx.saved_tensors
        sizes: _Sizes = ctx.sizes
        of_q, of_k, of_v = (gradient.contiguous() for gradient in gradients)
        of_mixed = torch.empty(ctx.shape, dtype=of_q.dtype, device=of_q.device)
        num_tokens = len(of_q)
        of_weights = [torch.zeros_like(weight) for weight in normed[1:]] or [None, None]
        if num_tokens:
            # without norms nothing is summed, and each program can have one token
            tokens_of_program = triton.cdiv(num_tokens, MOST_PROGRAMS) if normed else 1
            programs = triton.cdiv(num_tokens, tokens_of_program)
            mixed_B, q_weight, k_weight = normed or (of_mixed, cos_B, cos_B)
            sums = cos_B
            if normed:
                sums = torch.empty(programs, 2, sizes.channels, dtype=torch.float32, device=of_q.device)
            _backward[(programs,)](
                mixed_B,
                cos_B,
                sin_B,
                q_weight,
                k_weight,
                of_q,
                of_k,
                of_v,
                of_mixed,
                sums,
                num_tokens,
                tokens_of_program,
                ctx.eps,
                **sizes.constants(norm=bool(normed)),
            )
            if normed:
                of_weights = [total.to(weight.dtype) for total, weight in zip(sums.sum(0), normed[1:], strict=True)]
        return of_mixed, None, None, *of_weights, None, None


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
    """Turn the projection's output [B, (h + 2 g) d] into q [B, h, d], k and v [B, g, d]; all are contiguous.

    Args:
        cos_B, sin_B: [B, half] float32.
        weights: of the norms of queries and keys, [d] each; None without norms.
    """
    channels = mixed_B.size(-1) // (num_heads + 2 * num_groups)
    half = cos_B.size(-1)
    assert mixed_B.dim() == 2 and len(cos_B) == len(sin_B) == len(mixed_B) and 0 < 2 * half <= channels
    q_weight, k_weight = (None, None) if weights is None else (weight.contiguous() for weight in weights)
    sizes = _Sizes(num_heads, num_groups, channels, half, interleaved)
    return _SplitHeads.apply(  # pyright: ignore[reportReturnType]
        mixed_B.contiguous(), cos_B.contiguous(), sin_B.contiguous(), q_weight, k_weight, sizes, eps
    )
