"""Pipeline stages and virtual stages: the layers of each, the model parts of a rank, and what their schedule requires.

- Used by: `rules.stages`, which checks the flags; `plan.memory_model`, which counts with them; trainers, which build,
  plan and run with them.
- Invariant: the numbers of layers and of model parts are computed only here.
"""

from __future__ import annotations

from slime.config.args import Args
from slime.core.architecture import Architecture


def stage_layers(args: Args, arch: Architecture) -> list[int]:
    """Return the number of layers of each pipeline stage."""
    stages = args.pipeline_model_parallel_size
    last = args.decoder_last_pipeline_num_layers
    if stages == 1 or last is None:
        return [arch.num_layers // stages] * stages
    return [(arch.num_layers - last) // (stages - 1)] * (stages - 1) + [last]


def stage_layer_numbers(args: Args, arch: Architecture) -> list[list[int]]:
    """Return the numbers of each pipeline stage's layers, counted from 0; those of virtual stages are not adjacent.

    8 layers on 2 stages, each with 2 virtual stages, are [[0, 1, 4, 5], [2, 3, 6, 7]].
    """
    chunks, stages = num_chunks(args), stage_layers(args, arch)
    numbers: list[list[int]] = [[] for _ in stages]
    first = 0
    for _ in range(chunks):
        for own, count in zip(numbers, stages, strict=True):
            own += range(first, first + count // chunks)
            first += count // chunks
    return numbers


def num_chunks(args: Args) -> int:
    """Return the number of virtual stages per pipeline stage, whose layers are not adjacent; 1: none."""
    stages, arch = args.pipeline_model_parallel_size, args.architecture
    if stages == 1:
        return 1
    if args.num_virtual_stages_per_pipeline_rank is not None:
        return args.num_virtual_stages_per_pipeline_rank
    layers = args.num_layers_per_virtual_pipeline_stage
    return 1 if layers is None or arch is None else max(arch.num_layers // stages // layers, 1)


def micro_batch_group(args: Args) -> int:
    """Return the number of micro-batches that one model part processes before the next part."""
    return args.megatron_extra.get("microbatch_group_size_per_vp_stage") or args.pipeline_model_parallel_size


def count_multiple(args: Args) -> int:
    """Return the number that divides a step's number of micro-batches; the interleaved schedule runs whole groups."""
    return micro_batch_group(args) if num_chunks(args) > 1 else 1


def overlaps(args: Args) -> bool:
    """Return whether stages send while they compute, which virtual stages do by default and others cannot.

    Without overlap, two ranks with virtual stages would exchange several tensors at once in both directions, and
    Megatron distinguishes these only by their order. So two ranks require the overlap.
    """
    return num_chunks(args) > 1 and bool(args.megatron_extra.get("overlap_p2p_comm", True))
