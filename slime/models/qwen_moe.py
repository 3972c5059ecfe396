"""Qwen3-MoE (HF `Qwen3MoeForCausalLM`): Qwen3's attention; a softmax router, and experts in the place of the MLP.

Files name each expert's tensors, also those that transformers holds as one in memory.
"""

from __future__ import annotations

from slime.core.architecture import Architecture
from slime.models.decoder import pre_norm
from slime.models.mapping import Rule


def rules(architecture: Architecture) -> list[Rule]:
    return pre_norm(architecture)
