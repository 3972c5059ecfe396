"""Qwen3 dense (HF `Qwen3ForCausalLM`): norms on queries and keys instead of Qwen2's biases."""

from __future__ import annotations

from slime.models.decoder import pre_norm
from slime.models.family import Family

FAMILY = Family(
    model_type="qwen3",
    transformers_class="Qwen3",
    rules=pre_norm,
    read=lambda config: {"qk_layernorm": True},
    default_head_dim=128,
    windows="some layers",
    refuses_attention_bias=True,
    flags=("--qk-layernorm",),
)
