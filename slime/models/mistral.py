"""Mistral (HF `MistralForCausalLM`): a Llama by shape, for models without sliding-window attention."""

from __future__ import annotations

from slime.models.decoder import pre_norm
from slime.models.family import Family, with_head_dim

FAMILY = Family(
    model_type="mistral",
    transformers_class="Mistral",
    rules=pre_norm,
    # a config.json without the key has a window of 4,096 tokens in transformers
    write=lambda arch: with_head_dim(arch) | {"sliding_window": None},
    windows="unless null",
    refuses_attention_bias=True,
    shares_flags=True,
)
