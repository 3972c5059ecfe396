"""Qwen3-MoE (HF `Qwen3MoeForCausalLM`): Qwen3's attention, and a softmax router with experts instead of the MLP.

HF files have separate tensors for each expert, even when transformers keeps them fused in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slime.core.architecture import Architecture
from slime.models.decoder import pre_norm
from slime.models.family import Family, with_head_dim


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "qk_layernorm": True,
        # transformers 5 writes the newer name num_local_experts
        "num_experts": config["num_experts"] if "num_experts" in config else config["num_local_experts"],
        "first_dense_layers": _num_dense_layers(config),
        "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
    }


def _num_dense_layers(config: Mapping[str, Any]) -> int:
    """Return the number of dense first layers."""
    dense = list(config.get("mlp_only_layers") or [])
    if config.get("decoder_sparse_step", 1) != 1 or sorted(dense) != list(range(len(dense))):
        raise ValueError("dense layers between layers of experts (decoder_sparse_step, mlp_only_layers) are not built")
    return len(dense)


def _write(arch: Architecture) -> dict[str, Any]:
    return with_head_dim(arch) | {"mlp_only_layers": list(range(arch.first_dense_layers))}


FAMILY = Family(
    model_type="qwen3_moe",
    transformers_class="Qwen3Moe",
    rules=pre_norm,
    read=_read,
    write=_write,
    hf_keys={
        "num_experts": "num_experts",
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "moe_router_topk": "num_experts_per_tok",
        "norm_topk_prob": "norm_topk_prob",
    },
    windows="all layers",
    refuses_attention_bias=True,
    flags=("--qk-layernorm",),
    has_experts=True,
)
