"""The registry of model families, from HF `model_type` to the record of the family.

- Used by: config, megatron, the embedded engine and the tools.
- Invariant: the weights of every family in FAMILIES survive the way to HF and back (tests/models).
"""

from __future__ import annotations

from collections.abc import Mapping

from slime.core.architecture import Architecture
from slime.models import glm4, glm4_moe, llama, mistral, qwen2, qwen3, qwen3_moe
from slime.models.family import Family
from slime.models.mapping import WeightTable

FAMILIES: Mapping[str, Family] = {
    "glm4": glm4.FAMILY,
    "glm4_moe": glm4_moe.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "qwen2": qwen2.FAMILY,
    "mistral": mistral.FAMILY,
    "llama": llama.FAMILY,
}
"""All families. A message that explains the flags of families lists them in this order, the plainest last."""


def family_names() -> str:
    """Return the names of all families in alphabetical order, for messages."""
    return ", ".join(sorted(FAMILIES))


def weight_table(architecture: Architecture) -> WeightTable:
    """Return the weight table for the family of `architecture`.

    Raises:
        ValueError: there is no such family.
    """
    if architecture.family not in FAMILIES:
        raise ValueError(f"model_type {architecture.family!r} has no weight table; there are: {family_names()}")
    family = FAMILIES[architecture.family]
    # Files of tied models often hold the output layer too, as a copy of the embedding.
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if architecture.tied_embeddings else {}
    return WeightTable(family.rules(architecture), architecture.num_layers, copies, family.ignored_prefix(architecture))
