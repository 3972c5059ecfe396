"""GLM-4 dense (HF `Glm4ForCausalLM`): norms before and after both sub-layers, one fused gate-up projection in HF."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slime.core.architecture import Architecture
from slime.models.decoder import HF_LAYER, MEGATRON_LAYER, attention, norm, row_parallel, with_embeddings
from slime.models.family import Family, with_head_dim
from slime.models.mapping import GateUp, Rule


def _rules(architecture: Architecture) -> list[Rule]:
    return with_embeddings(
        architecture,
        [
            norm("input_layernorm", "input_layernorm"),
            *attention(architecture),
            norm("post_self_attn_layernorm", "post_self_attn_layernorm"),
            # HF names the norm by its position (after attention), Megatron by what it feeds (the MLP).
            norm("pre_mlp_layernorm", "post_attention_layernorm"),
            GateUp(f"{MEGATRON_LAYER}mlp.linear_fc1.weight", (f"{HF_LAYER}mlp.gate_up_proj.weight",)),
            row_parallel("mlp.linear_fc2", "mlp.down_proj"),
            norm("post_mlp_layernorm", "post_mlp_layernorm"),
        ],
    )


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rotary_interleaved": True,
        "add_qkv_bias": bool(config.get("attention_bias", True)),
        "post_self_attn_layernorm": True,
        "post_mlp_layernorm": True,
    }


FAMILY = Family(
    model_type="glm4",
    transformers_class="Glm4",
    rules=_rules,
    read=_read,
    write=lambda arch: with_head_dim(arch) | {"attention_bias": arch.add_qkv_bias},
    default_head_dim=128,
    partial_rotary=True,
    plain_tokenizer=True,
    flags=("--post-self-attn-layernorm", "--post-mlp-layernorm"),
    optional_flags=("--add-qkv-bias",),
    fused_gate_up=True,
)
