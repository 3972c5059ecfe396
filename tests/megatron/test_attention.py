"""Packed attention on a CPU: rotary positions against Megatron's, padded rectangles against one call a sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from slime.core.architecture import Architecture
from slime.megatron.attention import _attend_padded, apply_rotary, pack_sequences, padded_layout

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
    """What Megatron's RoPE asks of a context-parallel group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("percent", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_is_megatrons(interleaved: bool, percent: float, dtype: torch.dtype) -> None:
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


def test_rectangles_attend_as_sequences_do() -> None:
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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_layout_places_every_token_once(lengths: list[int]) -> None:
    layout = padded_layout(lengths)
    assert layout.slots_to_tokens[layout.tokens_to_slots_B].tolist() == list(range(sum(lengths)))
    assert sum(rows * length for rows, length in layout.shapes) == len(layout.slots_to_tokens)
    assert sum(rows for rows, _ in layout.shapes) == len(lengths)
    assert len(layout.slots_to_tokens) * 0.75 <= sum(lengths)
