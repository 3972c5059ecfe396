"""GLM-4.5 (HF `Glm4MoeForCausalLM`): dense layers first, then MoE layers with a sigmoid router and a shared expert.

HF files also contain an MTP layer (multi-token prediction) after the last layer. Like transformers, we neither read nor
write it.
"""

from __future__ import annotations

from slime.core.architecture import Architecture
from slime.models.decoder import pre_norm
from slime.models.mapping import Rule


def rules(architecture: Architecture) -> list[Rule]:
    """Return the weight rules of GLM-4.5."""
    return pre_norm(architecture)
