"""The registry of model families: from HF `model_type` to the weight table.

- Used by: import from HF, export to HF and weight sync.
- Invariant: the weights of every family in FAMILIES survive the way to HF and back (tests/models).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from slime.core.architecture import Architecture
from slime.models import glm4, glm4_moe, llama, qwen, qwen_moe
from slime.models.mapping import Rule, WeightTable

FAMILIES: Mapping[str, Callable[[Architecture], list[Rule]]] = {
    "glm4": glm4.rules,
    "glm4_moe": glm4_moe.rules,
    "llama": llama.rules,
    "qwen2": qwen.rules,
    "qwen3": qwen.rules,
    "qwen3_moe": qwen_moe.rules,
}


def weight_table(architecture: Architecture) -> WeightTable:
    """Return the weight table for the family of `architecture`.

    Raises:
        ValueError: there is no such family.
    """
    if architecture.family not in FAMILIES:
        raise ValueError(f"model_type {architecture.family!r} has no weight table; there are: {', '.join(FAMILIES)}")
    # Files of tied models often hold the output layer too, as a copy of the embedding.
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if architecture.tied_embeddings else {}
    mtp_layer = f"model.layers.{architecture.num_layers}." if architecture.family == "glm4_moe" else None
    return WeightTable(FAMILIES[architecture.family](architecture), architecture.num_layers, copies, mtp_layer)
