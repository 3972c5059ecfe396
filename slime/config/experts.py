"""The fields of Architecture for mixtures of experts, read from config.json or Megatron's flags and written as flags.

- Used by: `config.architecture`, for the fields that a dense model leaves at their defaults.
- Invariant: a field and its flag describe the same, and each can be computed from the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slime.core.architecture import Architecture

FAMILIES = ("glm4_moe", "qwen3_moe")


@dataclass(frozen=True)
class ExpertFlag:
    """Megatron's flag for one field of Architecture. It passes through, so its value is in `Args.megatron_extra`."""

    name: str
    read: Callable[[Any, int], Any] = lambda value, num_layers: value
    """Convert the flag's value to the field's; the second argument is the model's number of layers."""
    write: Callable[[Any, int], Any] = lambda value, num_layers: value


def _first_dense_layers(pattern: int | Sequence[int], num_layers: int) -> int:
    """Count the dense first layers of --moe-layer-freq, in which 1 is a layer of experts and 0 a dense one.

    Raises:
        ValueError: a dense layer follows a layer of experts, or the pattern has another length.
    """
    layers = [int(i % pattern == 0) for i in range(num_layers)] if isinstance(pattern, int) else list(pattern)
    dense = layers.index(1) if 1 in layers else len(layers)
    if layers != [0] * dense + [1] * (num_layers - dense) or dense == num_layers:
        raise ValueError(
            f"--moe-layer-freq {pattern} is not supported: of {num_layers} layers, the first must be dense and the "
            "others, at least one, have experts, such as [0]*1+[1]*45 for 46 layers"
        )
    return dense


FLAGS: Mapping[str, ExpertFlag] = {
    "moe_ffn_hidden_size": ExpertFlag("moe_ffn_hidden_size"),
    "moe_router_topk": ExpertFlag("moe_router_topk"),
    "first_dense_layers": ExpertFlag(
        "moe_layer_freq", _first_dense_layers, lambda dense, layers: [0] * dense + [1] * (layers - dense)
    ),
    "shared_expert_ffn_hidden_size": ExpertFlag("moe_shared_expert_intermediate_size", lambda value, _: value or 0),
    "router_score": ExpertFlag("moe_router_score_function"),
    "router_bias": ExpertFlag("moe_router_enable_expert_bias"),
    "norm_topk_prob": ExpertFlag("moe_router_pre_softmax", lambda value, _: not value, lambda value, _: not value),
    "routed_scaling_factor": ExpertFlag("moe_router_topk_scaling_factor", lambda value, _: value or 1.0),
    "router_groups": ExpertFlag("moe_router_num_groups", lambda value, _: value or 1),
    "router_topk_groups": ExpertFlag("moe_router_group_topk", lambda value, _: value or 1),
}
"""Map from field of Architecture to its flag; `num_experts` is a flag of slime's own table."""

FLAG_NAMES = tuple(flag.name for flag in FLAGS.values())
NEEDED = ("moe_ffn_hidden_size", "moe_router_topk")
"""Flags that MODEL_ARGS alone need to describe a mixture of experts."""

_HF_KEYS: Mapping[str, Mapping[str, str]] = {
    "qwen3_moe": {
        "num_experts": "num_experts",
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "moe_router_topk": "num_experts_per_tok",
        "norm_topk_prob": "norm_topk_prob",
    },
    "glm4_moe": {
        "num_experts": "n_routed_experts",
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "moe_router_topk": "num_experts_per_tok",
        "first_dense_layers": "first_k_dense_replace",
        "norm_topk_prob": "norm_topk_prob",
        "routed_scaling_factor": "routed_scaling_factor",
        "router_groups": "n_group",
        "router_topk_groups": "topk_group",
    },
}


def hf_keys(family: str) -> Mapping[str, str]:
    """Return, for each field of Architecture, the key in a config.json of this family; empty for a dense family."""
    return _HF_KEYS.get(family, {})


def hf_experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Architecture that a config.json of experts describes; empty for a dense family.

    Raises:
        ValueError: the arrangement of layers or the MoE router is not supported.
        KeyError: a required key is missing.
    """
    family = config["model_type"]
    if family not in FAMILIES:
        return {}
    if family == "qwen3_moe":
        found: dict[str, Any] = {
            # transformers 5 writes the newer name num_local_experts
            "num_experts": config["num_experts"] if "num_experts" in config else config["num_local_experts"],
            "first_dense_layers": _mlp_only_layers(config),
            "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
        }
    else:
        found = {
            "num_experts": config["n_routed_experts"],
            "first_dense_layers": config.get("first_k_dense_replace", 1),
            "shared_expert_ffn_hidden_size": config["moe_intermediate_size"] * config.get("n_shared_experts", 1),
            "router_score": "sigmoid",
            "router_bias": True,
            "norm_topk_prob": bool(config.get("norm_topk_prob", True)),
            "routed_scaling_factor": float(config.get("routed_scaling_factor", 1.0)),
            "router_groups": config.get("n_group") or 1,
            "router_topk_groups": config.get("topk_group") or 1,
        }
        if not found["norm_topk_prob"]:
            raise ValueError(
                "a sigmoid router with weights that are not normalized (norm_topk_prob false) is not built"
            )
    found["moe_ffn_hidden_size"] = config["moe_intermediate_size"]
    found["moe_router_topk"] = config["num_experts_per_tok"]
    if not 0 < found["moe_router_topk"] <= found["num_experts"]:
        raise ValueError(f"{found['moe_router_topk']} experts per token cannot be chosen from {found['num_experts']}")
    if found["first_dense_layers"] >= config["num_hidden_layers"]:
        raise ValueError("none of its layers has experts; describe it as a dense model")
    return found


def _mlp_only_layers(config: Mapping[str, Any]) -> int:
    """Return the number of dense first layers."""
    dense = list(config.get("mlp_only_layers") or [])
    if config.get("decoder_sparse_step", 1) != 1 or sorted(dense) != list(range(len(dense))):
        raise ValueError("dense layers between layers of experts (decoder_sparse_step, mlp_only_layers) are not built")
    return len(dense)


def _flags(score: str) -> Mapping[str, ExpertFlag]:
    """Return the flags of an MoE router with this score function. With sigmoid, --moe-router-pre-softmax is unused."""
    return {field: flag for field, flag in FLAGS.items() if score == "softmax" or field != "norm_topk_prob"}


def as_flags(arch: Architecture) -> dict[str, Any]:
    """Return Megatron's flags that describe the experts of `arch`, by name; empty for a dense model."""
    if not arch.num_experts:
        return {}
    flags = _flags(arch.router_score)
    return {flag.name: flag.write(getattr(arch, field), arch.num_layers) for field, flag in flags.items()}


def given_fields(extra: Mapping[str, Any], like: Architecture) -> dict[str, Any]:
    """Return the fields of Architecture that Megatron's flags (`Args.megatron_extra`) set.

    `like` is the architecture with the values of flags that are not given.

    Raises:
        ValueError: the arrangement of layers is not supported.
    """
    flags = _flags(extra.get(FLAGS["router_score"].name, like.router_score))
    return {field: flag.read(extra[flag.name], like.num_layers) for field, flag in flags.items() if flag.name in extra}


def given_flags(extra: Mapping[str, Any], like: Architecture) -> dict[str, Any]:
    """Return the given flags by name, with values in the form of `as_flags`; empty for a dense model."""
    if not like.num_experts:
        return {}
    fields = given_fields(extra, like)
    return {FLAGS[field].name: FLAGS[field].write(value, like.num_layers) for field, value in fields.items()}


def matching_family(given: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    """Return the family whose layers of experts MODEL_ARGS describe.

    Raises:
        ValueError: no family has such layers.
    """
    sigmoid = extra.get("moe_router_score_function") == "sigmoid"
    bias, shared = bool(extra.get("moe_router_enable_expert_bias")), extra.get("moe_shared_expert_intermediate_size")
    sandwich = given.get("post_self_attn_layernorm") or given.get("post_mlp_layernorm")
    if sigmoid and bias and shared and not sandwich:
        return "glm4_moe"
    if given.get("qk_layernorm") and not (sigmoid or bias or shared or sandwich or given.get("add_qkv_bias")):
        return "qwen3_moe"
    raise ValueError(
        "MODEL_ARGS match no supported family of experts: glm4_moe has --moe-router-score-function sigmoid, "
        "--moe-router-enable-expert-bias and --moe-shared-expert-intermediate-size, qwen3_moe has --qk-layernorm and "
        "none of these"
    )
