"""Packed attention on a CPU: rotary positions, padded rectangles, and pieces of sequences.

Rotary positions are compared with Megatron's, rectangles with one call per sequence, and pieces with whole sequences;
one process plays all context-parallel ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from slime.core.architecture import Architecture
from slime.megatron.microbatch import ContextParallel, Cut
from slime.megatron.model.attention import (
    PaddedLayout,
    Slots,
    _attend_padded,
    apply_rotary,
    attend,
    keys_of_pieces,
    pack_sequences,
    padded_layout,
)

SHAPE = Architecture(
    family="glm4",
    num_layers=1,
    hidden_size=64,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=10,
    max_position_embeddings=256,
    norm_epsilon=1e-5,
    rotary_base=10000.0,
)
LENGTHS = [5, 33, 1, 30, 12, 13]


class _OneRank:
    """The part of a context-parallel group of one rank that Megatron's RoPE reads."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("percent", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_matches_megatron(interleaved: bool, percent: float, dtype: torch.dtype) -> None:
    group: Any = _OneRank()
    rotary = RotaryEmbedding(16, percent, interleaved, use_cpu_initialization=True, cp_group=group)
    angles = torch.outer(torch.arange(40.0), rotary.inv_freq)
    angles = angles.repeat_interleave(2, 1) if interleaved else angles.repeat(1, 2)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    x = torch.randn(sum(LENGTHS), 4, 16, dtype=dtype).requires_grad_()
    upstream = torch.randn_like(x)
    expected = _apply_rotary_pos_emb_thd(x, ends, angles[:, None, None], interleaved, cp_group=group)
    [expected_gradient] = torch.autograd.grad(expected, x, upstream)
    packed = pack_sequences(LENGTHS, replace(SHAPE, rotary_percent=percent))
    found = apply_rotary(x, packed, interleaved=interleaved)
    [gradient] = torch.autograd.grad(found, x, upstream)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(gradient, expected_gradient, **tolerance)
    other = apply_rotary(x, packed, interleaved=not interleaved)
    assert (other - expected).abs().max() > 0.1


def _attend_each(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    rows = []
    for parts in zip(query.split(LENGTHS), key.split(LENGTHS), value.split(LENGTHS), strict=True):
        q, k, v = (part.transpose(0, 1)[None] for part in parts)
        rows.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(rows)


def test_rectangles_attend_like_sequences() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda heads: torch.randn(sum(LENGTHS), heads, 16, generator=generator).requires_grad_()  # noqa: E731
    inputs = [draw(4), draw(2), draw(2)]
    upstream = torch.randn(sum(LENGTHS), 4, 16, generator=generator)
    found = _attend_padded(*inputs, padded_layout(LENGTHS), None)
    expected = _attend_each(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    wrong = _attend_padded(*inputs, padded_layout([6, 32, *LENGTHS[2:]]), None)
    assert (wrong - expected).abs().max() > 0.1


def _wrong_slots(slots: Slots, lengths: list[int], widths: list[int]) -> bool:
    placed = slots.slots_to_tokens[slots.tokens_to_slots_B].tolist()
    return placed != list(range(sum(lengths))) or sum(widths) != len(slots.slots_to_tokens)


def _wrong(layout: PaddedLayout, lengths: list[int], offsets: list[int]) -> bool:
    reaches = [length + offset for length, offset in zip(lengths, offsets, strict=True)]
    return (
        sum(pieces for pieces, _, _ in layout.shapes) != len(lengths)
        or _wrong_slots(layout.queries, lengths, [pieces * queries for pieces, queries, _ in layout.shapes])
        or _wrong_slots(layout.keys, reaches, [pieces * keys for pieces, _, keys in layout.shapes])
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=20), st.booleans())
def test_layout_places_every_token_once(pieces: list[tuple[int, int]], whole: bool) -> None:
    lengths, offsets = [length for length, _ in pieces], [0 if whole else offset for _, offset in pieces]
    layout = padded_layout(lengths) if whole else padded_layout(lengths, offsets)
    assert not _wrong(layout, lengths, offsets)
    assert len(layout.queries.slots_to_tokens) * 0.75 <= sum(lengths)
    assert len(layout.keys.slots_to_tokens) * 0.75 <= sum(lengths) + sum(offsets)
    assert _wrong(layout, [lengths[0] + 1, *lengths[1:]], offsets)  # control


def _cut_attention(
    inputs: list[torch.Tensor], lengths: list[int], num_ranks: int, interleaved: bool, bug: str | None = None
) -> torch.Tensor:
    """Run rotary positions and attention of whole sequences as `num_ranks` ranks do on their pieces."""
    multiple = ContextParallel(0, num_ranks).row_multiple
    padded_S = np.array([length + -length % multiple for length in lengths])
    cut = Cut.of(padded_S, num_ranks)
    starts_S = np.cumsum(padded_S) - padded_S
    real = np.concatenate([start + np.arange(n) for start, n in zip(starts_S, lengths, strict=True)])
    # padding is filled with numbers that no query may see
    packs = [
        x.new_full((int(padded_S.sum()), *x.shape[1:]), 1e4).index_put((torch.from_numpy(real),), x) for x in inputs
    ]
    shares = [cut.share(ContextParallel(rank, num_ranks)) for rank in range(num_ranks)]
    parts = []
    for share, tokens_B in zip(shares, cut.tokens_CB, strict=True):
        if bug == "slice":
            tokens_B = np.roll(tokens_B, 1)
        packed = pack_sequences(cut.lengths_P.tolist(), SHAPE, share)
        turned = packed if bug != "positions" else pack_sequences(cut.lengths_P.tolist(), SHAPE)
        query, key, value = (pack[tokens_B] for pack in packs)
        query, key = (apply_rotary(x, turned, interleaved=interleaved) for x in (query, key))
        parts.append((query, torch.cat([key, value]), packed, share))
    out = torch.empty_like(packs[0])
    for rank, (query, _, packed, share) in enumerate(parts):
        rows = [
            row.detach() if bug == "gradient" and other != rank else row for other, (_, row, *_) in enumerate(parts)
        ]
        key, value = keys_of_pieces(torch.cat(rows), len(query), share)
        assert len(key) == int((cut.lengths_P + cut.offsets_CP[rank]).sum()), "no key that its piece may not see"
        out[cut.tokens_CB[rank]] = attend(query, key, value, packed, None)
    return out[real]


def _whole_attention(inputs: list[torch.Tensor], lengths: list[int], interleaved: bool) -> torch.Tensor:
    packed = pack_sequences(lengths, SHAPE)
    query, key = (apply_rotary(x, packed, interleaved=interleaved) for x in inputs[:2])
    return attend(query, key, inputs[2], packed, None)


def _cut_misses(
    lengths: list[int], num_ranks: int, dtype: torch.dtype, interleaved: bool = False, bug: str | None = None
) -> tuple[float, float]:
    """Return how far output and gradients of the pieces are from those of whole sequences."""
    generator = torch.Generator().manual_seed(len(lengths))
    draw = lambda heads: torch.randn(sum(lengths), heads, 16, generator=generator, dtype=dtype)  # noqa: E731
    inputs, upstream = [draw(heads).requires_grad_() for heads in (4, 2, 2)], draw(4)
    expected = _whole_attention(inputs, lengths, interleaved)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    found = _cut_attention(inputs, lengths, num_ranks, interleaved, bug)
    gradients = torch.autograd.grad(found, inputs, upstream)
    misses = [float((a - b).abs().max()) for a, b in zip(gradients, wanted, strict=True)]
    return float((found - expected).detach().abs().max()), max(misses)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    num_ranks=st.sampled_from([1, 2, 3, 4]),
    interleaved=st.booleans(),
)
def test_pieces_attend_like_whole_sequences(lengths: list[int], num_ranks: int, interleaved: bool) -> None:
    assert max(_cut_misses(lengths, num_ranks, torch.float64, interleaved)) <= 1e-12
    single, of_single = _cut_misses(lengths, num_ranks, torch.float32, interleaved)
    assert single <= 1e-6 and of_single <= 1e-5


def test_wrong_pieces_are_noticed() -> None:
    lengths = [33, 5, 1, 18]
    assert max(_cut_misses(lengths, 2, torch.float64)) <= 1e-12
    for bug in ("positions", "slice"):
        assert min(_cut_misses(lengths, 2, torch.float64, bug=bug)) > 1e-2, bug
    out, gradient = _cut_misses(lengths, 2, torch.float64, bug="gradient")  # a wrong gradient of other ranks' keys
    assert out <= 1e-12 and gradient > 1e-2


def test_ranks_have_equal_work() -> None:
    """Count the pairs of query and key that are not masked; as a control, contiguous halves are uneven."""
    cut = Cut.of(np.array([64, 16, 128]), 4)
    pairs_C = (cut.lengths_P * cut.offsets_CP + cut.lengths_P * (cut.lengths_P + 1) // 2).sum(1)
    assert pairs_C.min() == pairs_C.max() == sum(n * (n + 1) // 2 for n in (64, 16, 128)) // 4
    assert (cut.lengths_P * cut.offsets_CP)[:, ::2].sum(1).max() > 0 == (cut.lengths_P * cut.offsets_CP)[0, ::2].sum()
