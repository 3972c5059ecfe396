"""Lists of the Megatron fields that a run may set by name, with the two rules that check them.

- Used by: `rules.check`, which runs the two rules; other rules read the lists.
- Invariant: a field that passes does not change the function that the model computes, because the engine and the weight
  tables know only that function. A field in no list is refused, so a field that a later Megatron adds must be added
  to a list first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from slime.config.flags.table import FlagSpec, all_flags
from slime.config.problem import Problem, show
from slime.config.resolve import cuda_available
from slime.config.rules.case import Case

DECIDED: Mapping[str, Any] = {
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "moe_token_dispatcher_type": "alltoall",
    "deallocate_pipeline_outputs": True,
}
"""Fields that slime sets to one value. Fused kernels need TransformerEngine or Apex, packed rows need this dispatcher,
and the last field only saves memory."""

HARMLESS = frozenset(
    [
        # all weights are loaded
        "init_method_std",
        "embedding_init_method_std",
        # other kernels for the same function, or for something that slime computes itself
        "bias_activation_fusion",
        "cross_entropy_loss_fusion",
        "cross_entropy_fusion_impl",
        "gradient_accumulation_fusion",
        "persist_layer_norm",
        "memory_efficient_layer_norm",
        "disable_bf16_reduced_precision_matmul",
        "async_tensor_model_parallel_allreduce",
        # memory
        "recompute_modules",
        "distribute_saved_activations",
        "num_microbatches_with_partial_activation_checkpoints",
        "clone_scatter_output_in_embedding",
        # communication between pipeline stages and between context-parallel ranks
        "overlap_p2p_comm",
        "batch_p2p_comm",
        "batch_p2p_sync",
        "microbatch_group_size_per_vp_stage",
        "cp_comm_type",
        # data parallelism
        "bucket_size",
        "overlap_grad_reduce",
        "overlap_param_gather",
        "align_param_gather",
        "pad_buckets_for_high_nccl_busbw",
        "reduce_scatter_with_fp32_accumulation",
        "gradient_reduce_div_fusion",
        "check_for_nan_in_grad",
        "check_for_large_grads",
        # the optimizer
        "apply_wd_to_qk_layernorm",
        "decoupled_weight_decay",
        "use_precision_aware_optimizer",
        "optimizer_offload_fraction",
        "use_torch_optimizer_for_cpu_offload",
        "overlap_cpu_optimizer_d2h_h2d",
        "pin_cpu_grads",
        "pin_cpu_params",
        # timers and logging
        "barrier_with_L1_time",
        "log_num_zeros_in_grad",
    ]
)
OFFLOAD_OF_MEGATRON = frozenset(
    [
        "optimizer_offload_fraction",
        "use_torch_optimizer_for_cpu_offload",
        "overlap_cpu_optimizer_d2h_h2d",
        "pin_cpu_grads",
        "pin_cpu_params",
    ]
)
"""The harmless fields of Megatron's own offload, which slime does not use; `rules.optimizer` warns about them."""
HARMLESS_VALUES: Mapping[str, Any] = {"transformer_impl": "local"}
"""Fields that may be given with this value or with their default."""

JUDGED_ELSEWHERE = ("moe_", "overlap_moe_", "fp8", "fp4", "mtp_", "cpu_offloading", "tp_comm_")
"""Prefixes of fields that other rules handle (`not_built`, `no_effect`, `experts`), or that have no effect here.

The latter act only on TransformerEngine's layers, not on Megatron's local ones.
"""
NOT_BUILT_HERE = ("multi_latent_attention", "use_megatron_fsdp")
"""Whole names of fields that `not_built` handles."""


def _passed(case: Case) -> Iterable[tuple[FlagSpec, Any]]:
    specs = {spec.name: spec for spec in all_flags() if spec.source == "megatron"}
    return [(specs[name], value) for name, value in case.args.megatron_extra.items()]


def _error(spec: FlagSpec, value: Any, rule: str) -> Problem:
    where = spec.off[0] if value is False and spec.off else spec.flag
    return Problem(severity="error", where=where, value=show(value), rule=rule, remedy="leave the flag out")


def megatron_decided(case: Case) -> Iterable[Problem]:
    """Refuse another value for a field that slime sets itself."""
    for spec, value in _passed(case):
        decided = not cuda_available() if spec.name == "use_cpu_initialization" else DECIDED.get(spec.name, value)
        if value != decided:
            yield _error(spec, value, f"slime sets it to {decided} itself")


def megatron_known(case: Case) -> Iterable[Problem]:
    """Refuse a field that would change the trainer's model but not the engine's."""
    for spec, value in _passed(case):
        allowed = (
            spec.name in HARMLESS
            or spec.name in DECIDED
            or spec.name == "use_cpu_initialization"
            or spec.name in NOT_BUILT_HERE
            or spec.name.startswith(JUDGED_ELSEWHERE)
            or HARMLESS_VALUES.get(spec.name, spec.default) == value
        )
        if not allowed and value != spec.default:
            rule = "it may change what the trainer computes, and the engine and the weight tables do not know it"
            yield _error(spec, value, rule)
