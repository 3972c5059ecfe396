"""Qwen2 and Qwen2.5 (HF `Qwen2ForCausalLM`: QKV biases), Qwen3 (`Qwen3ForCausalLM`: norms on queries and keys).

- Used by: `families`, under both names.
- Invariant: the fields of the Architecture alone distinguish the two.
"""

from __future__ import annotations

from slime.core.architecture import Architecture
from slime.models.decoder import pre_norm
from slime.models.mapping import Rule


def rules(architecture: Architecture) -> list[Rule]:
    """Return the weight rules of dense Qwen models."""
    return pre_norm(architecture)
