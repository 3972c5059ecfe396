"""Rules for pipeline stages, virtual pipeline stages and recomputed layers.

- Used by: `rules.check`.
- Invariant: Megatron can build and run a layout that passes.
"""

from __future__ import annotations

from collections.abc import Iterable

from slime.config.args import Args
from slime.config.pipeline_stages import micro_batch_group, num_chunks, stage_layers
from slime.config.problem import Problem
from slime.config.rules.case import Case

RECOMPUTED_MODULES = ("core_attn", "mlp")
"""The modules that can be recomputed. Megatron's "layernorm" needs TransformerEngine, and its other modules belong to
layers that are not built here."""


def pipeline_stages(case: Case) -> Iterable[Problem]:
    """Check that all stages have equally many layers, except a last stage whose number of layers is given."""
    args, arch = case.args, case.args.architecture
    stages, last = args.pipeline_model_parallel_size, args.decoder_last_pipeline_num_layers
    if arch is None or stages == 1:
        return
    if last is None:
        if arch.num_layers % stages:
            rule = f"does not divide {arch.num_layers} layers"
            yield case.error("pipeline_model_parallel_size", rule, "add --decoder-last-pipeline-num-layers")
        return
    rest, others = arch.num_layers - last, stages - 1
    if rest < others or rest % others:
        rule = f"leaves {max(rest, 0)} of {arch.num_layers} layers, which {others} other stages cannot share evenly"
        about = ("pipeline_model_parallel_size",)
        yield case.error("decoder_last_pipeline_num_layers", rule, "choose another number", also=about)


_LAYERS, _COUNT = "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"


def virtual_stages(case: Case) -> Iterable[Problem]:
    """Check that one flag gives the virtual stages, that they have equally many layers, and the micro-batch groups."""
    args, arch = case.args, case.args.architecture
    layers, count = args.num_layers_per_virtual_pipeline_stage, args.num_virtual_stages_per_pipeline_rank
    stages, about = args.pipeline_model_parallel_size, ("pipeline_model_parallel_size",)
    if stages == 1 or (layers is None and count is None):
        if args.megatron_extra.get("overlap_p2p_comm"):
            yield _passed_on("--overlap-p2p-comm", "it needs virtual pipeline stages", "leave it out")
        return
    if layers is not None and count is not None:
        yield case.error(_LAYERS, f"--{_COUNT.replace('_', '-')} {count} also sets it", "give one", also=(_COUNT,))
        return
    if layers is not None and args.decoder_last_pipeline_num_layers is not None:
        rule = "stages with different numbers of layers cannot have virtual stages of one size"
        remedy = "give the number of virtual stages with --num-virtual-stages-per-pipeline-rank"
        yield case.error(_LAYERS, rule, remedy, also=("decoder_last_pipeline_num_layers",))
        return
    if arch is None or sum(stage_layers(args, arch)) != arch.num_layers:
        return  # another rule has reported it
    for own in sorted(set(stage_layers(args, arch))):
        if own % (layers or count or 1):
            rule = f"does not divide a stage's number of layers, {own}"
            yield case.error(_LAYERS if layers is not None else _COUNT, rule, "choose a divisor", also=about)
            return
    if num_chunks(args) > 1:
        yield from _interleaved(args)


def _interleaved(args: Args) -> Iterable[Problem]:
    """Check the requirements of Megatron's schedule for virtual stages."""
    stages = args.pipeline_model_parallel_size
    if micro_batch_group(args) < stages:
        rule = f"{micro_batch_group(args)} is less than the number of pipeline stages, {stages}"
        yield _passed_on("--microbatch-group-size-per-vp-stage", rule, f"give {stages}, or leave it out")
    overlap = args.megatron_extra.get("overlap_p2p_comm", True)
    if stages == 2 and not overlap:
        rule = "with virtual stages on two ranks, the order of their messages to each other would be ambiguous"
        yield _passed_on("--no-overlap-p2p-comm", rule, "leave it out")
    if args.megatron_extra.get("batch_p2p_comm") == overlap:
        where = "--batch-p2p-comm" if overlap else "--no-batch-p2p-comm"
        rule = "virtual stages send one by one if communication overlaps with compute, and in batches otherwise"
        yield _passed_on(where, rule, "leave it out")


def _passed_on(where: str, rule: str, remedy: str) -> Problem:
    """Return an error about one of Megatron's own fields."""
    return Problem(severity="error", where=where, rule=rule, remedy=remedy)


def recompute(case: Case) -> Iterable[Problem]:
    """Check the method, the number of layers and the modules of recomputation."""
    args = case.args
    num_layers = args.recompute_num_layers
    if args.recompute_granularity == "full" and (args.recompute_method is None or num_layers is None):
        remedy = "add --recompute-method uniform --recompute-num-layers 1"
        about = ("recompute_method", "recompute_num_layers")
        yield case.error("recompute_granularity", "full needs a method and a number of layers", remedy, also=about)
    if args.recompute_granularity == "selective":
        for field, value in (("recompute_method", args.recompute_method), ("recompute_num_layers", num_layers)):
            if value is not None:
                yield case.error(field, "selective recompute does not use it", "leave it out")
    modules: list[str] = args.megatron_extra.get("recompute_modules") or []
    unknown = [name for name in modules if name not in RECOMPUTED_MODULES]
    if unknown and case.real:
        rule = f"{', '.join(unknown)}: only {' and '.join(RECOMPUTED_MODULES)} can be recomputed here"
        yield Problem(severity="error", where="--recompute-modules", rule=rule, remedy="leave the others out")
    uniform = args.recompute_granularity == "full" and args.recompute_method == "uniform"
    if uniform and num_layers is not None and args.architecture is not None:
        for of_stage in sorted(set(stage_layers(args, args.architecture))):
            layers = of_stage // num_chunks(args)
            if layers % num_layers:
                stage = "virtual stage" if num_chunks(args) > 1 else "stage"
                rule = f"does not divide a {stage}'s number of layers, {layers}, with --recompute-method uniform"
                yield case.error("recompute_num_layers", rule, "choose a divisor", also=["recompute_method"])
