"""The fields of Architecture for mixtures of experts, read from config.json or Megatron's flags and written as flags.

- Used by: `config.architecture`, for the fields that a dense model leaves at their defaults; the model and the plan ask
  here whether experts run as grouped matrix products.
- Invariant: a field and its flag describe the same, and each can be computed from the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slime.core.architecture import Architecture


@dataclass(frozen=True)
class ExpertFlag:
    """Megatron's flag for one field of Architecture. It passes through, so its value is in `Args.megatron_extra`."""

    name: str
    read: Callable[[Any, int], Any] = lambda value, num_layers: value
    """Convert the flag's value to the field's; the second argument is the model's number of layers."""
    write: Callable[[Any, int], Any] = lambda value, num_layers: value


GROUPED_MULTIPLE = 8
"""The channels of bf16 in 16 bytes, of which the rows of a grouped matrix product have to be a multiple."""


def why_not_grouped(*, on_cuda: bool, bf16: bool, channels: Sequence[int]) -> str | None:
    """Return the reason for which experts run one after the other with --moe-grouped-gemm; None if there is none.

    Args:
        channels: the channels of an expert's inputs and outputs on one rank.
    """
    if not on_cuda:
        return "a CPU has no grouped matrix product"
    if not bf16:
        return "torch's grouped matrix product takes bf16 only"
    if any(size % GROUPED_MULTIPLE for size in channels):
        sizes = " and ".join(map(str, channels))
        return f"an expert's channels on a rank, {sizes}, are not all multiples of {GROUPED_MULTIPLE}"
    return None


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


def hf_experts(config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Architecture that all families with experts read alike; `own` are those of this family.

    Raises:
        ValueError: the number of experts for each token does not fit, or no layer has experts.
        KeyError: a required key is missing.
    """
    found: dict[str, Any] = {
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_router_topk": config["num_experts_per_tok"],
    }
    if not 0 < found["moe_router_topk"] <= own["num_experts"]:
        raise ValueError(f"{found['moe_router_topk']} experts per token cannot be chosen from {own['num_experts']}")
    if own["first_dense_layers"] >= config["num_hidden_layers"]:
        raise ValueError("none of its layers has experts; describe it as a dense model")
    return found


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
