"""Qwen3-MoE (HF `Qwen3MoeForCausalLM`): Qwen3's attention, and a softmax router with experts instead of the MLP.

HF files have separate tensors for each expert, even when transformers keeps them fused in memory.
"""

from __future__ import annotations

from slime.core.architecture import Architecture
from slime.models.decoder import pre_norm
from slime.models.mapping import Rule


def rules(architecture: Architecture) -> list[Rule]:
    """Return the weight rules of Qwen3-MoE."""
    return pre_norm(architecture)
