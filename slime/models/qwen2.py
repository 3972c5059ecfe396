"""Qwen2 and Qwen2.5 (HF `Qwen2ForCausalLM`): biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from slime.core.architecture import Architecture
from slime.models.decoder import pre_norm
from slime.models.family import Family, with_head_dim


def _write(arch: Architecture) -> dict[str, Any]:
    # transformers' own files of this family have no head_dim; it is written only if it differs from their default.
    usual = arch.kv_channels * arch.num_attention_heads == arch.hidden_size
    return {} if usual else with_head_dim(arch)


FAMILY = Family(
    model_type="qwen2",
    transformers_class="Qwen2",
    rules=pre_norm,
    read=lambda config: {"add_qkv_bias": True},
    write=_write,
    windows="some layers",
    flags=("--add-qkv-bias",),
)
