"""RoPE frequencies against those of transformers, and an Architecture's way through JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from slime.core.architecture import Architecture, RopeScaling
from slime.core.rotary import inverse_frequencies

SHAPE = Architecture(
    family="llama",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=64,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=64,
    vocab_size=10,
    max_position_embeddings=131072,
    norm_epsilon=1e-5,
    rotary_base=500000.0,
    rope_scaling=RopeScaling(factor=32.0),
)


def transformers_frequencies(arch: Architecture) -> torch.Tensor:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": arch.rotary_base}
    if arch.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **asdict(arch.rope_scaling)}
    rope["partial_rotary_factor"] = arch.rotary_percent
    config = LlamaConfig(head_dim=arch.kv_channels, rope_parameters=rope)
    if arch.rope_scaling is None:
        assert arch.rotary_percent == 1.0, "transformers' default type for Llama has no partial rotation"
        return LlamaRotaryEmbedding(config).inv_freq
    return ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": RopeScaling()},
        {"kv_channels": 128, "rotary_percent": 0.5},
        {"rotary_base": 10000.0, "rope_scaling": RopeScaling(original_max_position_embeddings=32)},
        {"rope_scaling": RopeScaling(factor=3.7, low_freq_factor=1.5, high_freq_factor=5.5)},
    ],
    ids=str,
)
def test_frequencies_equal_those_of_transformers(change: dict[str, Any]) -> None:
    arch = replace(SHAPE, **change)
    found = inverse_frequencies(arch)
    assert found.shape == (arch.rotary_dim // 2,)
    assert torch.equal(found, transformers_frequencies(arch))


def test_scaling_slows_only_slow_channels() -> None:
    plain, scaled = inverse_frequencies(replace(SHAPE, rope_scaling=None)), inverse_frequencies(SHAPE)
    ratio = plain / scaled
    turns = 8192 * plain / (2 * torch.pi)
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    torch.testing.assert_close(ratio[turns < 1], torch.full_like(ratio[turns < 1], 32.0))
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) > 1 and ((between > 1) & (between < 32)).all()


@pytest.mark.parametrize("arch", [SHAPE, replace(SHAPE, rope_scaling=None)])
def test_an_architecture_survives_json(arch: Architecture) -> None:
    """The engine's command line carries it in this form."""
    assert Architecture.from_dict(json.loads(json.dumps(asdict(arch)))) == arch
