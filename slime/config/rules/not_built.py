"""The rule for features that this version does not have: their flags parse and plan, but stop a real run.

- Used by: `rules.check`.
- Invariant: a value that switches a feature off passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from slime.config.problem import Problem
from slime.config.rules.case import Case


def off(value: Any) -> bool:
    """Return whether a switch is turned off."""
    return value is False


def other_than(*built: Any) -> Callable[[Any], bool]:
    """Return a check of whether a value is given and is not among `built`."""
    return lambda value: value is not None and value not in built


NOT_BUILT: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "normalization": (other_than("RMSNorm"), "a norm other than RMSNorm"),
    "position_embedding_type": (other_than("rope"), "a position embedding other than rope"),
    "use_rotary_position_embeddings": (off, "a position embedding other than rope"),
    "swiglu": (off, "an MLP without SwiGLU"),
    "disable_bias_linear": (off, "biases in linear layers"),
}
"""For each field, a function that returns whether a value requires a missing feature, and the feature's name."""

NOT_BUILT_MEGATRON: Mapping[str, str] = {
    "fp8": "it needs TransformerEngine",
    "fp4": "it needs TransformerEngine",
    "mtp_num_layers": "multi-token prediction",
    "multi_latent_attention": "multi-latent attention",
    "cpu_offloading": "it needs TransformerEngine",
    "use_megatron_fsdp": "Megatron's FSDP; --use-distributed-optimizer shards the optimizer",
    "overlap_param_gather": "weights are read right after a step, outside the layers that would wait for the gather",
    "reduce_scatter_with_fp32_accumulation": "gradients are always reduced in fp32",
    "use_precision_aware_optimizer": "it needs TransformerEngine's Adam",
    "num_microbatches_with_partial_activation_checkpoints": "all micro-batches are recomputed in the same way",
}
"""Fields of Megatron's own for missing features, and the reason; all are off by default."""


def not_built(case: Case) -> Iterable[Problem]:
    """Refuse missing features in a real run."""
    if not case.real:
        return
    for field, (asks, feature) in NOT_BUILT.items():
        if asks(vars(case.args)[field]):
            yield case.error(
                field, f"{feature}: not part of this version", "leave the flag out (--dry-run plans with it)"
            )
    for field, why in NOT_BUILT_MEGATRON.items():
        if case.args.megatron_extra.get(field):
            yield Problem(
                severity="error",
                where="--" + field.replace("_", "-"),
                rule=f"{why}: not part of this version",
                remedy="leave the flag out (--dry-run plans with it)",
            )
