"""Causal attention of packed sequences: flash attention on CUDA in 16 bits, PyTorch's SDPA otherwise.

- Used by: `attention` calls `attend` after it has applied rotary positions, with and without context parallelism.
- Invariant: the flash path never repeats grouped key/value heads in memory, and both paths use the same mask: query i
  of a sequence with q queries and k >= q keys sees the keys 0 .. i + k - q. This mask is aligned at the bottom right: a
  rank that has the last q tokens of a sequence needs it.

PyTorch's varlen_attn wraps the flash kernel that is called here directly. In torch 2.11 varlen_attn requires as many
key/value heads as query heads; the kernel does not (it sums the gradient over a group's heads itself). Its causal mask
is aligned at the bottom right (torch.nn.attention.bias builds causal_lower_right on that).

Shapes: _Q query tokens, _K key tokens of all sequences, _S sequences; h query heads, g key/value heads, d channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_FLASH_HEAD = 256


class _Flash(torch.autograd.Function):
    """Flash attention: aten::_flash_attention_forward and its backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query_Q: Tensor,
        key_K: Tensor,
        value_K: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        scale: float | None,
    ) -> Tensor:
        out_Q, log_sums, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            query_Q, key_K, value_K, cu_q, cu_k, max_q, max_k, 0.0, True, False, scale=scale
        )
        ctx.save_for_backward(query_Q, key_K, value_K, out_Q, log_sums, cu_q, cu_k, rng_state, unused)
        ctx.options = max_q, max_k, scale
        return out_Q

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query_Q, key_K, value_K, out_Q, log_sums, cu_q, cu_k, rng_state, unused = ctx.saved_tensors
        max_q, max_k, scale = ctx.options
        of_query_Q, of_key_K, of_value_K = torch.ops.aten._flash_attention_backward(
            gradients[0].contiguous(),
            query_Q,
            key_K,
            value_K,
            out_Q,
            log_sums,
            cu_q,
            cu_k,
            max_q,
            max_k,
            0.0,
            True,
            rng_state,
            unused,
            scale=scale,
        )
        return of_query_Q, of_key_K, of_value_K, None, None, None, None, None


def attend(
    query_Q: Tensor,
    key_K: Tensor,
    value_K: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
) -> Tensor:
    """Attend causally within each sequence, aligned at the bottom right: [Q, h, d], [K, g, d], [K, g, d] -> [Q, h, d].

    Args:
        cu_q, cu_k: [S + 1] int32, the position at which each sequence's queries and keys begin. A sequence has at least
            as many keys as queries.
        max_q, max_k: the longest of each.
        scale: the factor of the scores; None is 1 / sqrt(d).
    """
    head = query_Q.size(-1)
    if query_Q.is_cuda and query_Q.dtype != torch.float32 and head % 8 == 0 and head <= LARGEST_FLASH_HEAD:
        return _Flash.apply(query_Q, key_K, value_K, cu_q, cu_k, max_q, max_k, scale)  # pyright: ignore[reportReturnType]
    return attend_each(query_Q, key_K, value_K, cu_q, cu_k, scale)


def attend_each(
    query_Q: Tensor, key_K: Tensor, value_K: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float | None
) -> Tensor:
    """Compute `attend` with one SDPA call per sequence: correct everywhere, and slow."""
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    outputs: list[Tensor] = []
    for number in range(len(starts_q) - 1):
        rows = slice(starts_q[number], starts_q[number + 1])
        columns = slice(starts_k[number], starts_k[number + 1])
        q, k, v = (x.transpose(0, 1)[None] for x in (query_Q[rows], key_K[columns], value_K[columns]))
        length_q, length_k = q.size(2), k.size(2)
        if length_q == length_k:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        else:
            visible = torch.ones(length_q, length_k, dtype=torch.bool, device=q.device).tril(length_k - length_q)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)
