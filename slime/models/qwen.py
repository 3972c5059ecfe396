"""Dense Qwen2 and Qwen2.5 (HF `Qwen2ForCausalLM`: QKV biases), Qwen3 (`Qwen3ForCausalLM`: norms on queries and keys).

Path: `families` registers it under both names. Invariant: what tells the two apart stands in the Architecture.
"""

from __future__ import annotations

from slime.core.architecture import Architecture
from slime.models.decoder import pre_norm
from slime.models.mapping import Rule


def rules(architecture: Architecture) -> list[Rule]:
    return pre_norm(architecture)
