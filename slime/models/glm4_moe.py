"""GLM-4.5 (HF `Glm4MoeForCausalLM`): dense layers first, then MoE layers with a sigmoid router and a shared expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slime.core.architecture import Architecture
from slime.models.decoder import pre_norm
from slime.models.family import Family, with_head_dim


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    num_experts = config["n_routed_experts"]
    shared_size = config["moe_intermediate_size"] * config.get("n_shared_experts", 1)
    if not config.get("norm_topk_prob", True):
        raise ValueError("a sigmoid router with weights that are not normalized (norm_topk_prob false) is not built")
    return {
        "add_qkv_bias": bool(config.get("attention_bias", False)),
        "qk_layernorm": bool(config.get("use_qk_norm")),
        "num_experts": num_experts,
        "first_dense_layers": config.get("first_k_dense_replace", 1),
        "shared_expert_ffn_hidden_size": shared_size,
        "router_score": "sigmoid",
        "router_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": float(config.get("routed_scaling_factor", 1.0)),
        "router_groups": config.get("n_group") or 1,
        "router_topk_groups": config.get("topk_group") or 1,
    }


def _write(arch: Architecture) -> dict[str, Any]:
    return with_head_dim(arch) | {
        "attention_bias": arch.add_qkv_bias,
        "use_qk_norm": arch.qk_layernorm,
        "n_shared_experts": arch.shared_expert_ffn_hidden_size // arch.moe_ffn_hidden_size,
    }


FAMILY = Family(
    model_type="glm4_moe",
    transformers_class="Glm4Moe",
    rules=pre_norm,
    read=_read,
    write=_write,
    hf_keys={
        "num_experts": "n_routed_experts",
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "moe_router_topk": "num_experts_per_tok",
        "first_dense_layers": "first_k_dense_replace",
        "norm_topk_prob": "norm_topk_prob",
        "routed_scaling_factor": "routed_scaling_factor",
        "router_groups": "n_group",
        "router_topk_groups": "topk_group",
    },
    partial_rotary=True,
    plain_tokenizer=True,
    flags=(
        "--moe-router-score-function sigmoid",
        "--moe-router-enable-expert-bias",
        "--moe-shared-expert-intermediate-size",
    ),
    optional_flags=("--add-qkv-bias", "--qk-layernorm"),
    has_experts=True,
    has_mtp_layer=True,
)
