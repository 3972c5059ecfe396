"""Packed core attention: many sequences in one row of tokens, rotary positions applied, each causal within itself.

Path: `microbatch` lays the sequences out and hands a PackedSequences through Megatron to the PackedAttention of every
layer. Invariant: what a sequence yields does not depend on the others in its pack.

RoPE is applied here and not by Megatron: cos and sin are gathered once a micro-batch at the packed positions, where
Megatron's packed path would walk over the sequences in Python, twice a layer.

Shapes: _B tokens of a pack, _S sequences of a pack; h query heads, g key/value heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from slime.core.architecture import Architecture
from slime.core.rotary import inverse_frequencies
from slime.megatron import device

SHORTEST_IN_GROUP = 0.75
"""Sequences are padded to one length together where the shortest has at least this share of the longest."""


@dataclass(frozen=True)
class PaddedLayout:
    """Where the tokens of a pack lie when sequences of similar length are padded into rectangles (CPU)."""

    slots_to_tokens: Tensor
    """The packed token in each slot of all rectangles; padding slots repeat some token."""
    tokens_to_slots_B: Tensor
    shapes: list[tuple[int, int]]
    """(sequences, length) of each rectangle."""


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's packed-sequence parameters, and what packed attention needs besides."""

    cos_B: Tensor | None = None
    """[B, rotary_dim / 2], float32, and `sin_B` the same."""
    sin_B: Tensor | None = None
    layout: PaddedLayout | None = None
    """On a CPU only."""


def pack_sequences(lengths_S: Sequence[int], shape: Architecture) -> PackedSequences:
    """Sequences of these lengths, one behind the other, on this process's device."""
    where = device.device()
    lengths = torch.tensor(lengths_S, dtype=torch.int64)
    ends = lengths.cumsum(0)
    positions_B = torch.arange(int(ends[-1])) - torch.repeat_interleave(ends - lengths, lengths)
    cumulative = F.pad(ends, (1, 0)).int().to(where)
    angles_B = torch.outer(positions_B.float(), inverse_frequencies(shape))
    longest = max(lengths_S)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        cos_B=angles_B.cos().to(where),
        sin_B=angles_B.sin().to(where),
        layout=None if device.on_cuda() else padded_layout(lengths_S),
    )


def padded_layout(lengths_S: Sequence[int]) -> PaddedLayout:
    """Rectangles of sequences of similar length, longest first."""
    ends = torch.tensor(lengths_S).cumsum(0).tolist()
    order = sorted(range(len(lengths_S)), key=lambda sequence: -lengths_S[sequence])
    tokens_to_slots_B = torch.empty(ends[-1], dtype=torch.int64)
    slots: list[Tensor] = []
    shapes: list[tuple[int, int]] = []
    num_slots = 0
    while order:
        longest = lengths_S[order[0]]
        group = [sequence for sequence in order if lengths_S[sequence] >= SHORTEST_IN_GROUP * longest]
        order = order[len(group) :]
        columns = torch.arange(longest)
        lengths = torch.tensor([lengths_S[sequence] for sequence in group])[:, None]
        starts = torch.tensor([ends[sequence] - lengths_S[sequence] for sequence in group])[:, None]
        tokens = starts + torch.minimum(columns, lengths - 1)
        inside = columns < lengths
        tokens_to_slots_B[tokens[inside]] = num_slots + inside.flatten().nonzero().flatten()
        slots.append(tokens.flatten())
        shapes.append((len(group), longest))
        num_slots += len(group) * longest
    return PaddedLayout(torch.cat(slots), tokens_to_slots_B, shapes)


class _Pad(torch.autograd.Function):
    """Packed tokens -> padded slots. Padding slots carry no gradient: nothing that counts attends to them."""

    @staticmethod
    def forward(ctx: Any, packed_B: Tensor, layout: PaddedLayout) -> Tensor:
        ctx.layout = layout
        return packed_B.index_select(0, layout.slots_to_tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].index_select(0, ctx.layout.tokens_to_slots_B), None


class _Unpad(torch.autograd.Function):
    """Padded slots -> packed tokens."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, layout: PaddedLayout) -> Tensor:
        ctx.layout = layout
        return padded.index_select(0, layout.tokens_to_slots_B)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layout: PaddedLayout = ctx.layout
        padded = gradients[0].new_zeros((len(layout.slots_to_tokens), *gradients[0].shape[1:]))
        return padded.index_copy_(0, layout.tokens_to_slots_B, gradients[0]), None


def _rotate(x_B: Tensor, cos_B: Tensor, sin_B: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first 2 x cos.size(-1) channels: neighbouring pairs, or pairs half of them apart."""
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
    """RoPE (arXiv:2104.09864); its backward pass is the rotation the other way."""

    @staticmethod
    def forward(ctx: Any, x_B: Tensor, cos_B: Tensor, sin_B: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos_B, sin_B)
        ctx.interleaved = interleaved
        return _rotate(x_B, cos_B, sin_B, interleaved)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        cos_B, sin_B = ctx.saved_tensors
        return _rotate(gradients[0], cos_B, -sin_B, ctx.interleaved), None, None, None


def apply_rotary(x_B: Tensor, packed: PackedSequences, *, interleaved: bool) -> Tensor:
    """[B, heads, d] with RoPE at each token's position in its own sequence; channels past the rotary ones stay."""
    return _Rotary.apply(x_B, packed.cos_B, packed.sin_B, interleaved)  # pyright: ignore[reportReturnType]


def _attend_padded(query: Tensor, key: Tensor, value: Tensor, layout: PaddedLayout, scale: float | None) -> Tensor:
    """Causal attention of rectangles. Padding stands right of its sequence, so the causal mask hides it."""
    padded = [_Pad.apply(x, layout) for x in (query, key, value)]
    sizes = [sequences * length for sequences, length in layout.shapes]
    outputs: list[Tensor] = []
    for (sequences, length), *parts in zip(layout.shapes, *(x.split(sizes) for x in padded), strict=True):
        q, k, v = (x.unflatten(0, (sequences, length)).transpose(1, 2) for x in parts)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return _Unpad.apply(torch.cat(outputs), layout)  # pyright: ignore[reportReturnType]


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float | None) -> Tensor:
    """PyTorch's variable-length flash attention (CUDA, 16 bits)."""
    from torch.nn.attention.varlen import varlen_attn

    repeats = query.size(1) // key.size(1)
    key, value = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (key, value))
    assert packed.cu_seqlens_q is not None and packed.max_seqlen_q is not None
    ends, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    out = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale, window_size=(-1, 0))
    assert isinstance(out, Tensor)
    return out


class PackedAttention(MegatronModule):
    """Megatron's `core_attention`: rotary positions, then causal attention within each packed sequence."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[B, h, d], [B, g, d], [B, g, d] -> [B, h * d]."""
        assert isinstance(packed_seq_params, PackedSequences), "training is always packed"
        interleaved = self.config.rotary_interleaved
        query = apply_rotary(query, packed_seq_params, interleaved=interleaved)
        key = apply_rotary(key, packed_seq_params, interleaved=interleaved)
        if packed_seq_params.layout is not None:
            out = _attend_padded(query, key, value, packed_seq_params.layout, self.scale)
        else:
            out = _attend_varlen(query, key, value, packed_seq_params, self.scale)
        return out.flatten(1)
