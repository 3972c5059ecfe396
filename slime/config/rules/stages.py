"""How layers lie on pipeline stages, and which of them are recomputed.

Path: two of the rules. Invariant: what passes here, Megatron builds and runs.
"""

from __future__ import annotations

from collections.abc import Iterable

from slime.config.dry_run.memory import stage_layers
from slime.config.rules.case import Case
from slime.config.rules.problem import Problem

RECOMPUTED_MODULES = ("core_attn", "mlp")
"""Of Megatron's; "layernorm" needs TransformerEngine, the rest are of layers that are not built."""


def pipeline_stages(case: Case) -> Iterable[Problem]:
    """A stage has a layer at least; all have equally many, but for a last one whose number is given."""
    args, shape = case.args, case.args.architecture
    stages, last = args.pipeline_model_parallel_size, args.decoder_last_pipeline_num_layers
    if shape is None or stages == 1:
        return
    if last is None:
        if shape.num_layers % stages:
            rule = f"does not divide {shape.num_layers} layers"
            yield case.error("pipeline_model_parallel_size", rule, "add --decoder-last-pipeline-num-layers")
        return
    rest, others = shape.num_layers - last, stages - 1
    if rest < others or rest % others:
        rule = f"leaves {max(rest, 0)} of {shape.num_layers} layers, which {others} other stages cannot share evenly"
        about = ("pipeline_model_parallel_size",)
        yield case.error("decoder_last_pipeline_num_layers", rule, "choose another number", beside=about)


def recompute(case: Case) -> Iterable[Problem]:
    args = case.args
    num_layers = args.recompute_num_layers
    if args.recompute_granularity == "full" and (args.recompute_method is None or num_layers is None):
        remedy = "add --recompute-method uniform --recompute-num-layers 1"
        about = ("recompute_method", "recompute_num_layers")
        yield case.error("recompute_granularity", "full needs a method and a number of layers", remedy, beside=about)
    if args.recompute_granularity == "selective":
        for field, value in (("recompute_method", args.recompute_method), ("recompute_num_layers", num_layers)):
            if value is not None:
                yield case.error(field, "selective recompute takes none", "leave it out")
    modules: list[str] = args.megatron_extra.get("recompute_modules") or []
    unknown = [name for name in modules if name not in RECOMPUTED_MODULES]
    if unknown and case.real:
        rule = f"{', '.join(unknown)}: only {' and '.join(RECOMPUTED_MODULES)} can be recomputed here"
        yield Problem(severity="error", where="--recompute-modules", rule=rule, remedy="leave the others out")
    uniform = args.recompute_granularity == "full" and args.recompute_method == "uniform"
    if uniform and num_layers is not None and args.architecture is not None:
        for layers in sorted(set(stage_layers(args, args.architecture))):
            if layers % num_layers:
                rule = f"--recompute-method uniform: does not divide a stage's number of layers, {layers}"
                yield case.error("recompute_num_layers", rule, "choose a divisor", beside=["recompute_method"])
