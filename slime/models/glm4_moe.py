"""GLM-4.5 (HF `Glm4MoeForCausalLM`): dense layers first, then a sigmoid router, experts, and a shared expert.

Files hold a layer behind the last, which predicts several tokens at once: it is neither read nor written, as
transformers does.
"""

from __future__ import annotations

from slime.core.architecture import Architecture
from slime.models.decoder import pre_norm
from slime.models.mapping import Rule


def rules(architecture: Architecture) -> list[Rule]:
    return pre_norm(architecture)
