"""Virtual pipeline stages: into how many parts of the model each stage's layers are cut, and what their schedule asks.

Path: `rules.stages` checks the flags, `dry_run.memory` counts with them, and trainers build, plan and run by them.
Invariant: everything that has to agree about the number of parts asks here.
"""

from __future__ import annotations

from slime.config.args import Args


def num_chunks(args: Args) -> int:
    """Parts of the model on every stage, which do not follow on each other; 1: stages are not virtual."""
    stages, shape = args.pipeline_model_parallel_size, args.architecture
    if stages == 1:
        return 1
    if args.num_virtual_stages_per_pipeline_rank is not None:
        return args.num_virtual_stages_per_pipeline_rank
    layers = args.num_layers_per_virtual_pipeline_stage
    return 1 if layers is None or shape is None else max(shape.num_layers // stages // layers, 1)


def micro_batch_group(args: Args) -> int:
    """Micro-batches that a part of the model takes before it is the next part's turn."""
    return args.megatron_extra.get("microbatch_group_size_per_vp_stage") or args.pipeline_model_parallel_size


def count_multiple(args: Args) -> int:
    """A step has a multiple of so many micro-batches: the interleaved schedule runs whole groups alone."""
    return micro_batch_group(args) if num_chunks(args) > 1 else 1


def overlaps(args: Args) -> bool:
    """Whether stages send while they compute: what virtual stages do by default, and others cannot.

    Two virtual stages of the same two ranks would otherwise exchange several tensors at once in both directions, and
    Megatron tells these apart by their order alone: between two ranks it has to be so.
    """
    return num_chunks(args) > 1 and bool(args.megatron_extra.get("overlap_p2p_comm", True))
