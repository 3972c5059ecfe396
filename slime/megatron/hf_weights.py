"""Hugging Face weights into a sharded Megatron model, and out of it.

Path: at start a model is filled from an HF directory; export and weight sync iterate `iter_hf_tensors`. Invariant:
names, order and shapes are the same on every rank, and no more than one parameter is gathered at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from slime.config.args import Args
from slime.core.architecture import Architecture, padded_vocab_size
from slime.megatron.build import named_parameters
from slime.models.families import weight_table
from slime.models.hf_files import HFReader, write_hf
from slime.models.mapping import WeightTable


def load_hf_into(model: torch.nn.Module, architecture: Architecture, reader: HFReader, args: Args) -> None:
    """Fill this rank's shards from an HF directory, in the model's dtype; the vocabulary is padded with zero rows.

    An optimizer that keeps fp32 copies has to be told: `optimizer.reload_model_params()`.

    Raises:
        ValueError: names or shapes do not fit the architecture; all names that are too many or too few are listed.
    """
    table = weight_table(architecture)
    parameters = dict(named_parameters(model))
    table.check(parameters, reader.names())
    _check_copies(table, reader)
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    padded = padded_vocab_size(architecture.vocab_size, args.make_vocab_size_divisible_by, tp_size)
    for name in table.megatron_names():
        full = table.pad(name, table.from_hf(name, reader.get), padded)
        shard = table.split(name, full, tp_size, tp_rank)
        parameter = parameters[name]
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{', '.join(table.rule(name).hf)} in {reader.path}: {list(shard.shape)} for this rank, where the "
                f"architecture has {list(parameter.shape)}; MODEL_ARGS are not this checkpoint's"
            )
        with torch.no_grad():
            parameter.copy_(shard)


def _check_copies(table: WeightTable, reader: HFReader) -> None:
    """A tied model's file may hold the output layer as well; where it differs, it is not tied."""
    for name, original in table.optional_hf.items():
        if name in reader.names() and not torch.equal(reader.get(name), reader.get(original)):
            raise ValueError(
                f"{reader.path}: {name} differs from {original}, but the architecture ties them; use "
                "--untie-embeddings-and-output-weights, and tie_word_embeddings false in config.json"
            )


def iter_hf_tensors(model: torch.nn.Module, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """HF name and whole tensor, in the table's order, on every rank; collective over tensor parallelism.

    Tensors are contiguous copies on the model's device and in its dtype: the caller may keep them. All ranks have to
    run the iteration to its end.
    """
    table = weight_table(architecture)
    parameters = dict(named_parameters(model))
    table.check(parameters, table.hf_names())
    group = parallel_state.get_tensor_model_parallel_group()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    for name in table.megatron_names():
        parameter = parameters[name].detach()
        if table.rule(name).tp_axis is None or tp_size == 1:
            full = parameter.clone()
        else:
            shards = [torch.empty_like(parameter, memory_format=torch.contiguous_format) for _ in range(tp_size)]
            dist.all_gather(shards, parameter.contiguous(), group=group)
            full = table.join(name, shards)
        for hf_name, tensor in table.to_hf(name, full):
            yield hf_name, tensor.contiguous()


def save_hf(
    path: str | Path,
    model: torch.nn.Module,
    architecture: Architecture,
    source_hf_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Export an HF directory in `dtype`, None: the storage dtype of `source_hf_dir`. Collective, rank 0 writes."""
    tensors = iter_hf_tensors(model, architecture)
    if dist.get_rank() == 0:
        write_hf(path, tensors, source_hf_dir, dtype)
    else:
        for _ in tensors:
            continue
    dist.barrier()
