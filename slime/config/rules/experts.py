"""Rules for mixtures of experts: expert parallelism, load balancing, and Megatron's own flags for experts.

- Used by: `rules.check`.
- Invariant: the trainer can build a model that passes, and computes the same function as the engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from slime.config.experts import FLAG_NAMES
from slime.config.problem import Problem, flag_name, show
from slime.config.rules.case import Case
from slime.config.rules.megatron_fields import DECIDED

_EP, _ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
_BALANCE = ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_bias_update_rate")

PASSED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "moe_router_dtype": (lambda value: value == "fp32", "routers compute in float32"),
    "moe_router_load_balancing_type": (
        lambda value: value in ("aux_loss", "none"),
        "the auxiliary loss is aux_loss, per micro-batch (--moe-aux-loss-coeff 0 switches it off)",
    ),
    "moe_grouped_gemm": (lambda value: True, ""),
    "moe_shared_expert_overlap": (lambda value: True, ""),
    "moe_permute_fusion": (lambda value: not value, "it needs TransformerEngine"),
}
"""The values that Megatron's other fields for experts may have, and the reason for refusing others."""


def experts(case: Case) -> Iterable[Problem]:
    """Check how ranks share a model's experts."""
    args, arch = case.args, case.args.architecture
    if not args.num_experts or arch is None:
        if not args.num_experts:
            for field in (_EP, _ETP):
                if (vars(args)[field] or 1) > 1:
                    yield case.error(field, "the model has no experts to share", "leave it out, or make it 1")
        return
    tensor, stages = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    ep, etp = args.expert_model_parallel_size, args.expert_tensor_size
    if arch.num_experts % ep:
        yield case.error(_EP, f"does not divide {arch.num_experts} experts", "choose a divisor")
    if arch.moe_ffn_hidden_size % etp:
        field = _ETP if args.expert_tensor_parallel_size else "tensor_model_parallel_size"
        yield case.error(
            field, f"does not divide an expert's {arch.moe_ffn_hidden_size} channels", f"choose {flag_name(_ETP)}"
        )
    if arch.shared_expert_ffn_hidden_size % tensor:
        rule = f"does not divide the shared expert's {arch.shared_expert_ffn_hidden_size} channels"
        yield case.error("tensor_model_parallel_size", rule, "choose a divisor")
    if args.actor_world_size % (ep * etp * stages):
        rule = f"EP {ep} x ETP {etp} x PP {stages} = {ep * etp * stages} does not divide the "
        yield case.error(
            _EP,
            f"{rule}{args.actor_world_size} training GPUs",
            f"change it, or {flag_name(_ETP)} (by default --tensor-model-parallel-size)",
            also=[_ETP, "actor_num_nodes", "actor_num_gpus_per_node"],
        )
    if tensor > 1 and not args.sequence_parallel:
        rule = "a mixture of experts with tensor parallelism requires that each token is on one rank only"
        yield case.error("tensor_model_parallel_size", rule, "add --sequence-parallel", also=["sequence_parallel"])
    if args.spec:
        yield case.error("spec", "a mixture of experts has its own layers", "leave it out")


def balance(case: Case) -> Iterable[Problem]:
    """Check the flags for load balancing of experts."""
    args, arch = case.args, case.args.architecture
    if arch is None:
        return
    for field in _BALANCE:
        if vars(args)[field] and not args.num_experts:
            yield case.warning(field, "no effect: the model has no experts (--num-experts)", "leave it out")
    if args.num_experts and args.moe_aux_loss_coeff:
        rule = "it balances each micro-batch by itself, so training depends on how a step is split into micro-batches"
        yield case.warning("moe_aux_loss_coeff", rule, "nothing to do; no other loss depends on the split")
    if args.num_experts and args.moe_router_bias_update_rate and not arch.router_bias:
        rule = f"no effect: the MoE routers of {arch.family} have no bias"
        yield case.warning("moe_router_bias_update_rate", rule, "leave it out")


def experts_passed_on(case: Case) -> Iterable[Problem]:
    """Check the values of Megatron's other fields for experts."""
    if not case.args.num_experts:
        return
    for name, value in case.args.megatron_extra.items():
        if not name.startswith(("moe_", "overlap_moe_")) or name in FLAG_NAMES or name in DECIDED:
            continue
        allowed, why = PASSED.get(name, (lambda value: not value, "not part of this version"))
        if not allowed(value):
            yield Problem(
                severity="error", where=flag_name(name), value=show(value), rule=why, remedy="leave the flag out"
            )


def shared_expert_overlap(case: Case) -> Iterable[Problem]:
    """Check that a shared expert runs next to the dispatch only where Megatron can do both."""
    name = "moe_shared_expert_overlap"
    args, arch = case.args, case.args.architecture
    if arch is None or not args.num_experts or not args.megatron_extra.get(name):
        return
    if not arch.shared_expert_ffn_hidden_size:
        rule = f"no effect: {arch.family} has no shared expert"
        yield Problem(severity="warning", where=flag_name(name), rule=rule, remedy="leave it out")
    elif "shared_experts" in (args.megatron_extra.get("recompute_modules") or ()):
        rule = "a shared expert on a stream of its own cannot be recomputed by itself"
        remedy = "take shared_experts out of --recompute-modules, or leave this flag out"
        yield Problem(severity="error", where=flag_name(name), value="True", rule=rule, remedy=remedy)


def routing_replay(case: Case) -> Iterable[Problem]:
    """Check that the model has experts, if their choice is to be replayed in training."""
    arch = case.args.architecture
    if case.args.use_routing_replay and arch is not None and not arch.num_experts:
        rule = f"{arch.family} is a dense family without MoE routers"
        yield case.error("use_routing_replay", rule, "leave it out", also=["num_experts", "hf_checkpoint"])
