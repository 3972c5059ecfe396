"""Attention over packed tokens: many sequences in one row, each causal within itself, with rotary positions applied.

- Used by: `microbatch` builds a PackedSequences for each micro-batch, Megatron passes it through every layer, and each
  layer's PackedAttention reads it.
- Invariant: the output for a sequence depends neither on the other sequences of its pack nor on how context parallelism
  cuts it into pieces.

A *piece* is the range [offset, offset + length) of a sequence. Its queries attend to the keys [0, offset + length) of
that sequence. Without context parallelism a piece is a whole sequence. With it, each layer gathers the keys and values
of all ranks, and each piece selects those that it may see. For example, a sequence of 8 tokens on two ranks is cut into
four chunks of 2; rank 0 holds the tokens 0-1 and 6-7. Its first piece (offset 0) reads the keys 0-1, its second piece
(offset 6) reads the keys 0-7. See `microbatch.Cut` for why the chunks are paired like this (zigzag).

RoPE is applied here instead of in Megatron: cos and sin are computed once per micro-batch at the packed positions.
Megatron's packed path would loop over the sequences in Python, twice in every layer.

Shapes: _B packed tokens of this rank, _P the pieces that they form, _K keys of all pieces; h query heads,
g key/value heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from slime.core.architecture import Architecture
from slime.core.rotary import inverse_frequencies
from slime.megatron import device
from slime.megatron.model import flash_attention
from slime.megatron.model.kernels import rotary

SHORTEST_IN_GROUP = 0.75
"""Sequences are padded to a common length in one rectangle if the shortest has at least this share of the longest."""


@dataclass(frozen=True)
class Slots:
    """The positions of packed tokens in padded rectangles, in both directions."""

    slots_to_tokens: Tensor
    """The packed token in each slot of all rectangles. Padding slots repeat some token."""
    tokens_to_slots_B: Tensor


@dataclass(frozen=True)
class PaddedLayout:
    """The rectangles into which pieces of similar size are padded (CPU only)."""

    queries: Slots
    keys: Slots
    """Equal to `queries` if every piece is a whole sequence."""
    shapes: list[tuple[int, int, int]]
    """For each rectangle: (number of pieces, queries per piece, keys per piece)."""
    masks: list[Tensor | None]
    """[pieces, 1, queries, keys] bool: the keys that each query sees. None if every piece is square and causal."""


@dataclass(frozen=True)
class ContextShare:
    """The part of a pack that this rank holds under context parallelism."""

    offsets_P: Sequence[int]
    """The position in its sequence at which each piece begins."""
    keys_K: Tensor
    """The keys of each piece, piece after piece, as indices into the row of all ranks' tokens (rank by rank)."""
    group: dist.ProcessGroup | None
    """The context-parallel group; None only if one process plays all ranks."""


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's packed-sequence parameters, with what packed attention and the routers need in addition."""

    cos_B: Tensor | None = None
    """[B, rotary_dim / 2] float32, like `sin_B`."""
    sin_B: Tensor | None = None
    layout: PaddedLayout | None = None
    """Set on a CPU only."""
    share: ContextShare | None = None
    """Set under context parallelism only."""
    counts_B: Tensor | None = None
    """bool: True for tokens that are not padding. This field and the following ones are for MoE layers only."""
    step_tokens: int = 0
    """The number of tokens of the optimizer step, over all ranks, without padding; 0 means no auxiliary losses."""
    experts_B: Tensor | None = None
    """[B, MoE layers, top-k] int32: the experts that each token goes to. -1 leaves the choice to the router."""


def pack_sequences(lengths_P: Sequence[int], arch: Architecture, share: ContextShare | None = None) -> PackedSequences:
    """Lay out pieces of these lengths one after the other, on this process's device; no `share`: whole sequences."""
    lengths = torch.tensor(lengths_P, dtype=torch.int64)
    offsets = torch.zeros_like(lengths) if share is None else torch.tensor(share.offsets_P, dtype=torch.int64)
    ends = lengths.cumsum(0)
    positions_B = torch.arange(int(ends[-1])) + torch.repeat_interleave(offsets - ends + lengths, lengths)
    reaches = offsets + lengths
    # a position takes 4 bytes on its way to the device, its angles' cosines and sines would take hundreds
    angles_B = torch.outer(device.send(positions_B.float()), device.send(inverse_frequencies(arch)))
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=device.send(F.pad(ends, (1, 0)).int()),
        cu_seqlens_kv=device.send(F.pad(reaches.cumsum(0), (1, 0)).int()),
        max_seqlen_q=int(lengths.max()),
        max_seqlen_kv=int(reaches.max()),
        cos_B=angles_B.cos(),
        sin_B=angles_B.sin(),
        layout=None if device.on_cuda() else padded_layout(lengths.tolist(), offsets.tolist()),
        share=None if share is None else replace(share, keys_K=device.send(share.keys_K)),
    )


def padded_layout(lengths_P: Sequence[int], offsets_P: Sequence[int] | None = None) -> PaddedLayout:
    """Group pieces with similar numbers of queries and of keys into rectangles, those with the most keys first.

    Each round takes the longest piece that is left and all pieces of nearly its size. Lengths 8, 7, 3, 3 make two
    rectangles, 2 x 8 and 2 x 3: 22 slots for 21 tokens, where one rectangle would need 32.
    """
    offsets_P = [0] * len(lengths_P) if offsets_P is None else offsets_P
    reaches_P = [length + offset for length, offset in zip(lengths_P, offsets_P, strict=True)]
    groups: list[Tensor] = []
    order = sorted(range(len(lengths_P)), key=lambda piece: (-reaches_P[piece], -lengths_P[piece]))
    while order:
        most_keys, most_queries = reaches_P[order[0]], lengths_P[order[0]]
        alike: list[int] = []
        others: list[int] = []
        for piece in order:
            fits = reaches_P[piece] >= SHORTEST_IN_GROUP * most_keys
            fits = fits and SHORTEST_IN_GROUP * most_queries <= lengths_P[piece] <= most_queries
            (alike if fits else others).append(piece)
        groups.append(torch.tensor(alike))
        order = others
    lengths, offsets, reaches = (torch.tensor(values) for values in (lengths_P, offsets_P, reaches_P))
    queries = _slots(lengths, groups)
    whole = not bool(offsets.any())
    shapes: list[tuple[int, int, int]] = []
    masks: list[Tensor | None] = []
    for group in groups:
        num_queries, num_keys = int(lengths[group].max()), int(reaches[group].max())
        shapes.append((len(group), num_queries, num_keys))
        last_seen = offsets[group, None, None, None] + torch.arange(num_queries)[:, None]
        masks.append(torch.arange(num_keys) <= last_seen if bool(offsets[group].any()) else None)
    return PaddedLayout(queries, queries if whole else _slots(reaches, groups), shapes, masks)


def _slots(lengths: Tensor, groups: Sequence[Tensor]) -> Slots:
    """Place rows of these lengths, which lie one after the other, into one rectangle per group."""
    ends = lengths.cumsum(0)
    tokens_to_slots_B = torch.empty(int(ends[-1]), dtype=torch.int64)
    slots: list[Tensor] = []
    num_slots = 0
    for group in groups:
        columns = torch.arange(int(lengths[group].max()))
        rows = lengths[group][:, None]
        tokens = ends[group][:, None] - rows + torch.minimum(columns, rows - 1)
        inside = columns < rows
        tokens_to_slots_B[tokens[inside]] = num_slots + inside.flatten().nonzero().flatten()
        slots.append(tokens.flatten())
        num_slots += tokens.numel()
    return Slots(torch.cat(slots), tokens_to_slots_B)


class _Pad(torch.autograd.Function):
    """Packed tokens -> padded slots. Padding slots get no gradient, because no query that counts attends to them."""

    @staticmethod
    def forward(ctx: Any, packed_B: Tensor, slots: Slots) -> Tensor:
        ctx.slots = slots
        return packed_B.index_select(0, slots.slots_to_tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].index_select(0, ctx.slots.tokens_to_slots_B), None


class _Unpad(torch.autograd.Function):
    """Padded slots -> packed tokens."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, slots: Slots) -> Tensor:
        ctx.slots = slots
        return padded.index_select(0, slots.tokens_to_slots_B)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        slots: Slots = ctx.slots
        padded = gradients[0].new_zeros((len(slots.slots_to_tokens), *gradients[0].shape[1:]))
        return padded.index_copy_(0, slots.tokens_to_slots_B, gradients[0]), None


class _Gather(torch.autograd.Function):
    """Gather the rows of all ranks, rank by rank; the backward pass sums all ranks' gradients of this rank's rows.

    An all-to-all exchanges these gradients and they are added here, in a fixed order and with a single rounding. A
    reduce-scatter would promise neither.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = rows.new_empty((group.size() * len(rows), *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, rows, group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        of_all = gradients[0].contiguous()
        of_ours = torch.empty_like(of_all)
        dist.all_to_all_single(of_ours, of_all, group=ctx.group)
        return of_ours.unflatten(0, (ctx.group.size(), -1)).sum(0), None


def apply_rotary(x_B: Tensor, packed: PackedSequences, *, interleaved: bool) -> Tensor:
    """Apply RoPE to [B, heads, d] at each token's position in its own sequence; channels that do not rotate stay."""
    assert packed.cos_B is not None and packed.sin_B is not None
    return rotary(x_B, packed.cos_B, packed.sin_B, interleaved=interleaved)


def _attend_padded(query: Tensor, key: Tensor, value: Tensor, layout: PaddedLayout, scale: float | None) -> Tensor:
    """Run causal attention rectangle by rectangle. Padding comes after its piece, so the causal mask hides it."""
    q_all = _Pad.apply(query, layout.queries).split([pieces * queries for pieces, queries, _ in layout.shapes])
    k_all, v_all = (
        _Pad.apply(x, layout.keys).split([pieces * keys for pieces, _, keys in layout.shapes]) for x in (key, value)
    )
    outputs: list[Tensor] = []
    for (pieces, _, _), mask, *parts in zip(layout.shapes, layout.masks, q_all, k_all, v_all, strict=True):
        q, k, v = (x.unflatten(0, (pieces, -1)).transpose(1, 2) for x in parts)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return _Unpad.apply(torch.cat(outputs), layout.queries)  # pyright: ignore[reportReturnType]


def gather_keys(key: Tensor, value: Tensor, share: ContextShare) -> tuple[Tensor, Tensor]:
    """Turn this rank's keys and values [B, g, d] into those of its pieces [K, g, d], with one collective."""
    assert share.group is not None
    row: Any = _Gather.apply(torch.cat([key, value]), share.group)
    return keys_of_pieces(row, len(key), share)


def keys_of_pieces(row: Tensor, num_tokens: int, share: ContextShare) -> tuple[Tensor, Tensor]:
    """Select the pieces' keys and values from a row that has, for each rank, `num_tokens` keys and then as many values.

    With 3 tokens per rank the row is k0 k1 k2 v0 v1 v2 | k3 k4 k5 v3 v4 v5. Key 4 has index 4 among all ranks' tokens
    and index 7 in this row, because the 3 values of rank 0 come before it; its value is 3 places further.
    """
    keys_K = share.keys_K + share.keys_K // num_tokens * num_tokens  # skip the values of the ranks before
    return row.index_select(0, keys_K), row.index_select(0, keys_K + num_tokens)


def attend(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float | None, backend: str = "auto"
) -> Tensor:
    """Causal attention: queries [B, h, d] with the pieces' keys and values [K, g, d] -> [B, h, d].

    `backend` is --attention-backend; it has no effect on a CPU.
    """
    if packed.layout is not None:
        return _attend_padded(query, key, value, packed.layout, scale)
    assert packed.max_seqlen_q is not None and packed.max_seqlen_kv is not None
    return flash_attention.attend(
        query,
        key,
        value,
        packed.cu_seqlens_q,
        packed.cu_seqlens_kv,
        packed.max_seqlen_q,
        packed.max_seqlen_kv,
        scale,
        backend,
    )


class PackedAttention(MegatronModule):
    """Megatron's `core_attention`: it applies rotary positions, then causal attention within each packed sequence."""

    rotates = True
    """Set to False by a layer that applies the positions itself, in one pass with what comes before (`layer`)."""

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
        if self.rotates:
            interleaved = self.config.rotary_interleaved
            query = apply_rotary(query, packed_seq_params, interleaved=interleaved)
            key = apply_rotary(key, packed_seq_params, interleaved=interleaved)
        if packed_seq_params.share is not None:
            key, value = gather_keys(key, value, packed_seq_params.share)
        backend = self.config.attention_backend.name
        return attend(query, key, value, packed_seq_params, self.scale, backend).flatten(1)
