"""Llama 3 (HF `LlamaForCausalLM`): no biases, and no norms on queries and keys; RoPE scaling has no weights."""

from __future__ import annotations

from slime.models.decoder import pre_norm
from slime.models.family import Family

FAMILY = Family(model_type="llama", transformers_class="Llama", rules=pre_norm, refuses_attention_bias=True)
