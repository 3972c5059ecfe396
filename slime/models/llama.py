"""Llama 3 (HF `LlamaForCausalLM`): no biases, and no norms on queries and keys; RoPE scaling has no weights."""

from __future__ import annotations

from slime.core.architecture import Architecture
from slime.models.decoder import pre_norm
from slime.models.mapping import Rule


def rules(architecture: Architecture) -> list[Rule]:
    """Return the weight rules of Llama."""
    return pre_norm(architecture)
