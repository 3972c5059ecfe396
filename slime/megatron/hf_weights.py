"""Hugging Face weights into a sharded Megatron model, and out of it.

Path: at start a model is filled from an HF directory; export and weight sync iterate `iter_hf_tensors`. Invariant:
names, order and shapes are the same on every rank, and no more than GATHER_BYTES (or one parameter) are gathered at a
time, in one collective of each kind: a small parameter costs no round of its own.

A pipeline stage knows its own parameters only; what is checked against the weight table are those of all stages. A
tied output layer on the last of several stages goes by the embedding's name: it is filled like it, and not exported.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from slime.config.architecture import config_of, read_hf_config
from slime.config.args import Args
from slime.core.architecture import Architecture, padded_vocab_size
from slime.megatron import device
from slime.megatron.build import EMBEDDING, ModelChunks, named_parameters
from slime.megatron.parallel import pipeline_group, tensor_group
from slime.models.families import weight_table
from slime.models.hf_files import HFReader, write_hf
from slime.models.mapping import WeightTable

logger = logging.getLogger(__name__)
T = TypeVar("T")

GATHER_BYTES = 256 * 1024**2
"""Of whole tensors, in one collective over the tensor-parallel ranks (and one over the stages)."""
ALIGNMENT = 16


def load_hf_into(model: ModelChunks, architecture: Architecture, reader: HFReader, args: Args) -> None:
    """Fill this rank's shards from an HF directory, in the model's dtype; the vocabulary is padded with zero rows.

    An optimizer that keeps fp32 copies has to be told: `optimizer.reload_model_params()`.

    Raises:
        ValueError: names or shapes do not fit the architecture; all names that are too many or too few are listed.
    """
    table = weight_table(architecture)
    parameters = dict(named_parameters(model))
    table.check(_names(_stages(parameters)), reader.names())
    misfit = ""
    try:
        _check_copies(table, reader)
        _fill(parameters, table, reader, architecture, args)
    except ValueError as error:
        misfit = str(error)
    for message in _of_all_stages(misfit):  # of one stage perhaps; the others would wait for it
        if message:
            raise ValueError(message)


def _fill(
    parameters: Mapping[str, torch.nn.Parameter],
    table: WeightTable,
    reader: HFReader,
    architecture: Architecture,
    args: Args,
) -> None:
    tp_size, tp_rank = tensor_group().size(), tensor_group().rank()
    padded = padded_vocab_size(architecture.vocab_size, args.make_vocab_size_divisible_by, tp_size)
    for name, parameter in parameters.items():
        full = table.pad(name, table.from_hf(name, reader.get), padded)
        shard = table.split(name, full, tp_size, tp_rank)
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{', '.join(table.rule(name).hf)} in {reader.path}: {list(shard.shape)} for this rank, where the "
                f"architecture has {list(parameter.shape)}; MODEL_ARGS are not this checkpoint's"
            )
        with torch.no_grad():
            parameter.copy_(shard)


class _Held(NamedTuple):
    """One rank's part of a parameter."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def _stages(parameters: Mapping[str, torch.nn.Parameter]) -> list[dict[str, _Held]]:
    """What each pipeline stage holds, by global name."""
    return _of_all_stages({name: _Held(parameter.shape, parameter.dtype) for name, parameter in parameters.items()})


def _names(stages: Sequence[Mapping[str, _Held]]) -> set[str]:
    """Of the whole model. No two stages have the same, but for the copy of a tied embedding."""
    held = Counter(name for stage in stages for name in stage)
    assert all(times == 1 or name == EMBEDDING for name, times in held.items()), held
    return set(held)


def _of_all_stages(value: T) -> list[T]:
    """Each pipeline stage's `value`, first stage first."""
    group = pipeline_group()
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def _check_copies(table: WeightTable, reader: HFReader) -> None:
    """A tied model's file may hold the output layer as well; where it differs, it is not tied."""
    for name, original in table.optional_hf.items():
        if name in reader.names() and not torch.equal(reader.get(name), reader.get(original)):
            raise ValueError(
                f"{reader.path}: {name} differs from {original}, but the architecture ties them; use "
                "--untie-embeddings-and-output-weights, and tie_word_embeddings false in config.json"
            )


def iter_hf_tensors(model: ModelChunks, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """HF name and whole tensor, in the table's order, on every rank; collective over tensor and pipeline parallelism.

    Tensors are contiguous, on the model's device and in its dtype. They may be the parameters' own memory: clone what
    has to outlive the next change of the weights. All ranks have to run the iteration to its end.
    """
    table = weight_table(architecture)
    parameters = dict(named_parameters(model))
    stages = _stages(parameters)
    table.check(_names(stages), table.hf_names())
    for owner, names in _gathers(table, stages, tensor_group().size()):
        parts = _of_stage(owner, [parameters.get(name) for name in names], [stages[owner][name] for name in names])
        cut = [i for i, name in enumerate(names) if table.rule(name).tp_axis is not None]
        shards = dict(zip(cut, _of_all_tensor_ranks([parts[i] for i in cut]), strict=True))
        for i, name in enumerate(names):
            full = table.join(name, shards[i]) if i in shards else parts[i]
            for hf_name, tensor in table.to_hf(name, full):
                yield hf_name, tensor.contiguous()


def _gathers(
    table: WeightTable, stages: Sequence[Mapping[str, _Held]], tp_size: int
) -> Iterator[tuple[int, list[str]]]:
    """Parameters that are gathered together, in the table's order, and the stage that holds them."""
    together: list[str] = []
    holder, size = 0, 0
    for name in table.megatron_names():
        owner = next(stage for stage, held in enumerate(stages) if name in held)
        whole = stages[owner][name].nbytes * (1 if table.rule(name).tp_axis is None else tp_size)
        if together and (owner != holder or size + whole > GATHER_BYTES):
            yield holder, together
            together, size = [], 0
        holder, size = owner, size + whole
        together.append(name)
    yield holder, together


def _of_stage(owner: int, parameters: Sequence[torch.nn.Parameter | None], held: Sequence[_Held]) -> list[Tensor]:
    """The stage `owner`'s `parameters`, on every stage; None in the place of those of another one."""
    group = pipeline_group()
    if group.size() == 1:
        return [parameter.detach() for parameter in parameters if parameter is not None]
    flat, parts = _side_by_side(held)
    if group.rank() == owner:
        for part, parameter in zip(parts, parameters, strict=True):
            assert parameter is not None
            part.copy_(parameter.detach())
    dist.broadcast(flat, group=group, group_src=owner)
    return parts


def _of_all_tensor_ranks(parts: Sequence[Tensor]) -> list[list[Tensor]]:
    """For each part, those of all ranks in their order."""
    group = tensor_group()
    if group.size() == 1 or not parts:
        return [[part] for part in parts]
    held = [_Held(part.shape, part.dtype) for part in parts]
    flat, own = _side_by_side(held)
    for mine, part in zip(own, parts, strict=True):
        mine.copy_(part)
    gathered = flat.new_empty(group.size() * flat.numel())
    dist.all_gather_into_tensor(gathered, flat, group=group)
    ranks = [_views(rank, held) for rank in gathered.chunk(group.size())]
    return [list(shards) for shards in zip(*ranks, strict=True)]


def _side_by_side(held: Sequence[_Held]) -> tuple[Tensor, list[Tensor]]:
    """Uninitialised memory for all of `held` as bytes, and each one's place in it."""
    flat = torch.empty(sum(map(_room, held)), dtype=torch.uint8, device=device.device())
    return flat, _views(flat, held)


def _views(flat: Tensor, held: Sequence[_Held]) -> list[Tensor]:
    parts = flat.split([_room(each) for each in held])
    return [part[: each.nbytes].view(each.dtype).view(each.shape) for part, each in zip(parts, held, strict=True)]


def _room(held: _Held) -> int:
    """Bytes up to the next one's place, at which any dtype may begin."""
    return -(-held.nbytes // ALIGNMENT) * ALIGNMENT


def save_hf(
    path: str | Path,
    model: ModelChunks,
    architecture: Architecture,
    source_hf_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Export an HF directory in `dtype`, None: the storage dtype of `source_hf_dir`. Collective, rank 0 writes.

    Its config.json describes the model that was trained, also where --override-hf-config parts it from the source's.
    """
    tensors = iter_hf_tensors(model, architecture)
    if dist.get_rank() == 0:
        source = read_hf_config(source_hf_dir)
        config, unsaid = config_of(architecture, source)
        if unsaid:
            logger.warning("%s: its config.json has no way to say %s, which the run overrides", path, ", ".join(unsaid))
        write_hf(path, tensors, source_hf_dir, dtype, config=None if config == source else config)
    else:
        for _ in tensors:
            continue
    dist.barrier()
