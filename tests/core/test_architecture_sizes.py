"""Sizes that follow from an Architecture: parameters by hand, MoE layers, the padded vocabulary."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slime.core.architecture import Architecture, RopeScaling, padded_vocab_size

DENSE = Architecture(
    family="qwen3",
    num_layers=3,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=6,
    vocab_size=100,
    max_position_embeddings=64,
    norm_epsilon=1e-6,
    rotary_base=10000.0,
    rotary_percent=0.5,
)
MOE = replace(
    DENSE,
    num_experts=5,
    moe_ffn_hidden_size=7,
    moe_router_topk=2,
    first_dense_layers=1,
    shared_expert_ffn_hidden_size=9,
)
ATTENTION = 8 * 24 + 2 * 8 * 12 + 24 * 8
"""Parameters of query, key and value, and output projection."""


def test_parameters_of_a_dense_model() -> None:
    layer = ATTENTION + 3 * 8 * 16 + 2 * 8
    assert DENSE.num_parameters() == DENSE.num_active_parameters() == 3 * layer + 2 * 100 * 8 + 8
    assert replace(DENSE, tied_embeddings=True).num_parameters() == DENSE.num_parameters() - 800


@pytest.mark.parametrize(
    ("option", "parameters"),
    [
        ("add_qkv_bias", 24 + 2 * 12),
        ("qk_layernorm", 2 * 6),
        ("post_self_attn_layernorm", 8),
        ("post_mlp_layernorm", 8),
    ],
)
def test_options_add_parameters_to_each_layer(option: str, parameters: int) -> None:
    assert replace(DENSE, **{option: True}).num_parameters() == DENSE.num_parameters() + 3 * parameters


def test_parameters_of_a_moe_model() -> None:
    dense, shared, router, expert = 3 * 8 * 16, 3 * 8 * 9, 5 * 8, 3 * 8 * 7
    rest = 3 * (ATTENTION + 2 * 8) + 2 * 100 * 8 + 8
    assert MOE.num_parameters() == rest + dense + 2 * (shared + router + 5 * expert)
    assert MOE.num_active_parameters() == rest + dense + 2 * (shared + router + 2 * expert)
    assert replace(MOE, router_bias=True).num_parameters() == MOE.num_parameters()


def test_moe_layers_follow_the_dense_ones() -> None:
    assert [MOE.is_moe_layer(layer) for layer in range(3)] == [False, True, True]
    assert MOE.num_moe_layers == 2
    assert not DENSE.is_moe_layer(2) and DENSE.num_moe_layers == 0


def test_rope_rotates_a_part_of_each_head() -> None:
    assert DENSE.rotary_dim == 3


@pytest.mark.parametrize(
    ("vocab_size", "divisible_by", "tensor_parallel_size", "padded"),
    [(100, 1, 1, 100), (100, 128, 1, 128), (128, 128, 1, 128), (129, 128, 1, 256), (129, 128, 4, 512), (9, 4, 3, 12)],
)
def test_the_padded_vocabulary(vocab_size: int, divisible_by: int, tensor_parallel_size: int, padded: int) -> None:
    assert padded_vocab_size(vocab_size, divisible_by, tensor_parallel_size) == padded


def test_defaults_are_those_of_a_plain_decoder() -> None:
    on = [name for name, value in vars(DENSE).items() if value is True]
    assert on == ["norm_topk_prob"] and DENSE.rope_scaling is None and not DENSE.num_experts
    assert vars(RopeScaling()) == {  # Llama 3.1's
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
