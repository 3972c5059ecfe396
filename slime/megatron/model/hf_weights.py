"""Hugging Face weights into a sharded Megatron model, and out of it.

- Used by: at start a model is filled from an HF directory; export and weight sync iterate `iter_hf_tensors`.
- Invariant: names, order and shapes are the same on every rank. At most GATHER_BYTES (or one parameter) are gathered at
  a time, with one collective of each kind, so that a small parameter does not cost a collective of its own.

A pipeline stage knows only its own parameters, so the names of all stages are gathered before they are compared with
the weight table. On the last of several stages a tied output layer has the embedding's name: it is filled like the
embedding, and not exported.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from slime.config.architecture import config_of, read_hf_config
from slime.config.args import Args
from slime.config.quantized import refuse_quantized
from slime.core.architecture import Architecture, padded_vocab_size
from slime.core.weight_parts import WeightPart
from slime.megatron import device
from slime.megatron.model.build import EMBEDDING, OUTPUT, VALUE_HEAD, ModelChunks, named_weights
from slime.megatron.parallel import expert_place, pipeline_group, tensor_group
from slime.models.families import weight_table
from slime.models.hf_files import HFReader, write_hf
from slime.models.mapping import WeightTable

logger = logging.getLogger(__name__)
T = TypeVar("T")

GATHER_BYTES = 256 * 1024**2
"""The bytes of whole tensors in one collective over the tensor-parallel ranks (and one over the stages)."""
ALIGNMENT = 16


def load_hf_into(model: ModelChunks, architecture: Architecture, reader: HFReader, args: Args) -> None:
    """Fill this rank's shards from an HF directory, in the model's dtype; the vocabulary is padded with zero rows.

    If the optimizer keeps fp32 copies, call `optimizer.reload_model_params()` afterwards.

    Raises:
        ValueError: the directory's weights are quantized, or names or shapes do not fit the architecture; the message
            lists all missing and all unknown names.
    """
    refuse_quantized(reader.path)
    table = weight_table(architecture)
    weights = dict(named_weights(model))
    names = _names(_stages(weights))
    if VALUE_HEAD in names:  # a critic takes a policy's weights except its output layer, and keeps its own value head
        weights.pop(VALUE_HEAD, None)
        names = names - {VALUE_HEAD} | ({OUTPUT} if not architecture.tied_embeddings else set())
    table.check(names, reader.names())
    misfit = ""
    try:
        _check_copies(table, reader)
        _fill(weights, table, reader, architecture, args)
    except ValueError as error:
        misfit = str(error)
    # The error may exist on one stage or one expert rank only; the others would wait for it, so all ranks share it.
    for message in _of_all_experts("".join(dict.fromkeys(_of_all_stages(misfit)))):
        if message:
            raise ValueError(message)


def _fill(
    weights: Mapping[str, Tensor],
    table: WeightTable,
    reader: HFReader,
    architecture: Architecture,
    args: Args,
) -> None:
    tp_size, tp_rank = tensor_group().size(), tensor_group().rank()
    padded = padded_vocab_size(architecture.vocab_size, args.make_vocab_size_divisible_by, tp_size)
    place = expert_place()
    for name, weight in weights.items():
        full = table.pad(name, table.from_hf(name, reader.get), padded)
        part = (tp_size, tp_rank) if _expert(name) is None else (place.etp_size, place.etp_rank)
        shard = table.split(name, full, *part)
        if shard.shape != weight.shape:
            raise ValueError(
                f"{', '.join(table.rule(name).hf)} in {reader.path}: {list(shard.shape)} for this rank, where the "
                f"architecture has {list(weight.shape)}; MODEL_ARGS are not this checkpoint's"
            )
        with torch.no_grad():
            weight.copy_(shard)


class _Held(NamedTuple):
    """The shape and dtype of one rank's part of a weight."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def _stages(weights: Mapping[str, Tensor]) -> list[dict[str, _Held]]:
    """Return what each pipeline stage holds, by global name.

    For experts these are the names on the rank with our own place in expert parallelism, not those of all ranks.
    """
    return _of_all_stages({name: _Held(weight.shape, weight.dtype) for name, weight in weights.items()})


def _names(stages: Sequence[Mapping[str, _Held]]) -> set[str]:
    """Return the names of the whole model; stages share no name but that of a tied embedding."""
    held = Counter(name for stage in stages for name in stage)
    assert all(times == 1 or name == EMBEDDING for name, times in held.items()), held
    return set(held).union(*_of_all_experts({name for name in held if _expert(name) is not None}))


def _of_all_stages(value: T) -> list[T]:
    """Gather each pipeline stage's `value`, first stage first."""
    group = pipeline_group()
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def _of_all_experts(value: T) -> list[T]:
    """Gather the `value` of each rank that holds a part of this stage's experts."""
    group = expert_place().group
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+")


def _expert(name: str) -> int | None:
    """Return the number of the expert that a global name belongs to; None for other weights."""
    found = _EXPERT.search(name)
    return None if found is None else int(found.group())


def _of_expert(name: str, expert: int) -> str:
    """Return the name of the same weight in another expert."""
    return _EXPERT.sub(str(expert), name)


def _check_copies(table: WeightTable, reader: HFReader) -> None:
    """Check that a stored copy of a tied output layer equals the embedding; otherwise the model is not tied."""
    for name, original in table.optional_hf.items():
        if name in reader.names() and not torch.equal(reader.get(name), reader.get(original)):
            raise ValueError(
                f"{reader.path}: {name} differs from {original}, but the architecture ties them; use "
                "--untie-embeddings-and-output-weights, and tie_word_embeddings false in config.json"
            )


def iter_hf_tensors(model: ModelChunks, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Yield HF name and whole tensor, on every rank; collective over tensor, pipeline and expert parallelism.

    Tensors come in the table's order. Within a layer's experts, the first expert of each rank comes before the second
    of each: with 4 experts on 2 ranks the order is 0, 2, 1, 3, because one collective brings the same local expert of
    every rank. Tensors are contiguous, on the model's device and in its dtype. They may share the weights' memory:
    clone what has to outlive the next change of the weights. All ranks have to run the iteration to its end.
    """
    table, weights = weight_table(architecture), dict(named_weights(model))
    stages = _stages(weights)
    table.check(_names(stages), table.hf_names())
    yield from _iter_whole(table, weights, stages, architecture.num_experts)


def iter_whole_tensors(tensors: Mapping[str, Tensor], architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Like `iter_hf_tensors`, for any tensors with the weights' names and sharding: gradients, a critic's weights.

    A tensor that no rank has is left out. A critic's value head comes last, by its own name.
    """
    stages = _stages(tensors)
    yield from _iter_whole(weight_table(architecture), tensors, stages, architecture.num_experts)
    for stage, held in enumerate(stages):
        if VALUE_HEAD in held:
            [whole] = _of_stage(stage, [tensors.get(VALUE_HEAD)], [held[VALUE_HEAD]])
            yield VALUE_HEAD, whole


def _iter_whole(
    table: WeightTable, weights: Mapping[str, Tensor], stages: Sequence[Mapping[str, _Held]], num_experts: int
) -> Iterator[tuple[str, Tensor]]:
    place = expert_place()
    num_local = num_experts // place.ep_size
    for owner, names in _gathers(table, stages, num_local):
        parts = _of_stage(owner, [weights.get(name) for name in names], [stages[owner][name] for name in names])
        experts = [i for i, name in enumerate(names) if _expert(name) is not None]
        cut = [i for i, name in enumerate(names) if i not in experts and table.rule(name).tp_axis is not None]
        gathered = dict(zip(cut, _of_all_ranks([parts[i] for i in cut], tensor_group()), strict=True))
        gathered |= dict(zip(experts, _of_all_ranks([parts[i] for i in experts], place.group), strict=True))
        for i, name in enumerate(names):
            shards = gathered.get(i, [parts[i]])
            expert = _expert(name)
            wholes = {name: shards}
            if expert is not None:  # rank r's expert with the same local index is number `local + r * num_local`
                wholes = {
                    _of_expert(name, expert % num_local + rank * num_local): shards[rank * place.etp_size :][
                        : place.etp_size
                    ]
                    for rank in range(place.ep_size)
                }
            for whole, of_whole in wholes.items():
                for hf_name, tensor in table.to_hf(whole, table.join(whole, of_whole)):
                    yield hf_name, tensor.contiguous()


def weight_parts(model: ModelChunks, architecture: Architecture) -> list[WeightPart]:
    """Return this rank's parts of the weights, in the order of their turns; collective over all ranks, once.

    No weight leaves its pipeline stage or its expert rank. The experts' turns come first: one for each expert rank of
    the first stage, then of the second... The other weights of each stage follow. For example, with two stages and two
    expert ranks, turns 0 and 1 are the experts of stage 0, 2 and 3 those of stage 1, and 4 and 5 the rest of each. So
    no rank streams one part for a peer while it should send another one, and the last part is not empty.
    """
    table = weight_table(architecture)
    stages = _stages(dict(named_weights(model)))
    table.check(_names(stages), table.hf_names())
    stage, place = pipeline_group().rank(), expert_place()
    num_turns = len(stages)
    first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0

    def part(turn: int, *, experts: bool, sent: bool) -> WeightPart:
        def tensors() -> Iterator[tuple[str, Tensor]]:
            return _iter_own(table, dict(named_weights(model)), stages, architecture.num_experts, experts=experts)

        return WeightPart(turn, num_turns, sent, tensors)

    parts: list[WeightPart] = []
    if architecture.num_experts:
        num_turns += len(stages) * place.ep_size
        owns = parallel_state.get_expert_data_parallel_rank() == 0 and place.etp_rank == 0
        parts.append(part(stage * place.ep_size + place.ep_rank, experts=True, sent=owns))
    rest = part(num_turns - len(stages) + stage, experts=False, sent=first and tensor_group().rank() == 0)
    return [*parts, rest]


def _iter_own(
    table: WeightTable,
    weights: Mapping[str, Tensor],
    stages: Sequence[Mapping[str, _Held]],
    num_experts: int,
    *,
    experts: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Yield this stage's and this expert rank's whole tensors: its experts, or all others."""
    stage, place = pipeline_group().rank(), expert_place()
    for owner, names in _gathers(table, stages, num_experts // place.ep_size):
        own = [name for name in names if owner == stage and (_expert(name) is not None) == experts]
        parts = [weights[name].detach() for name in own]
        cut = [i for i, name in enumerate(own) if experts or table.rule(name).tp_axis is not None]
        group = place.tensor_group if experts else tensor_group()
        gathered = dict(zip(cut, _of_all_ranks([parts[i] for i in cut], group), strict=True))
        for i, name in enumerate(own):
            for hf_name, tensor in table.to_hf(name, table.join(name, gathered.get(i, [parts[i]]))):
                yield hf_name, tensor.contiguous()


def _gathers(
    table: WeightTable, stages: Sequence[Mapping[str, _Held]], num_local: int
) -> Iterator[tuple[int, list[str]]]:
    """Yield weights that are gathered together, in the table's order, and the stage that holds them.

    For experts these are the `num_local` per layer of this rank; every other rank has one at the same local index. A
    weight that no stage holds is left out.
    """
    together: list[str] = []
    holder, size = 0, 0
    place, tp_size = expert_place(), tensor_group().size()
    for name in table.megatron_names():
        expert, copies = _expert(name), 1 if table.rule(name).tp_axis is None else tp_size
        if expert is not None:
            if expert >= num_local:
                continue
            name, copies = _of_expert(name, expert + place.ep_rank * num_local), place.group.size()
        owner = next((stage for stage, held in enumerate(stages) if name in held), None)
        if owner is None:
            continue
        whole = stages[owner][name].nbytes * copies
        if together and (owner != holder or size + whole > GATHER_BYTES):
            yield holder, together
            together, size = [], 0
        holder, size = owner, size + whole
        together.append(name)
    yield holder, together


def _of_stage(owner: int, weights: Sequence[Tensor | None], held: Sequence[_Held]) -> list[Tensor]:
    """Broadcast the `weights` of stage `owner` to every stage; other stages pass None for them."""
    group = pipeline_group()
    if group.size() == 1:
        return [weight.detach() for weight in weights if weight is not None]
    flat, parts = _side_by_side(held)
    if group.rank() == owner:
        for part, weight in zip(parts, weights, strict=True):
            assert weight is not None
            part.copy_(weight.detach())
    dist.broadcast(flat, group=group, group_src=owner)
    return parts


def _of_all_ranks(parts: Sequence[Tensor], group: dist.ProcessGroup) -> list[list[Tensor]]:
    """For each part, gather the parts of all ranks of `group`, in rank order."""
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
    """Return uninitialized memory for all of `held` as bytes, and a view of it for each."""
    flat = torch.empty(sum(map(_room, held)), dtype=torch.uint8, device=device.device())
    return flat, _views(flat, held)


def _views(flat: Tensor, held: Sequence[_Held]) -> list[Tensor]:
    parts = flat.split([_room(each) for each in held])
    return [part[: each.nbytes].view(each.dtype).view(each.shape) for part, each in zip(parts, held, strict=True)]


def _room(held: _Held) -> int:
    """Return the bytes from one part's offset to the next one's, rounded up so that any dtype may begin there."""
    return -(-held.nbytes // ALIGNMENT) * ALIGNMENT


def save_hf(
    path: str | Path,
    model: ModelChunks,
    architecture: Architecture,
    source_hf_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Export an HF directory in `dtype`; None: the storage dtype of `source_hf_dir`. Collective; rank 0 writes.

    Its config.json describes the trained model, even if --override-hf-config makes it differ from the source's.
    """
    tensors = iter_hf_tensors(model, architecture)
    if dist.get_rank() == 0:
        source = read_hf_config(source_hf_dir)
        config, unsaid = config_of(architecture, source)
        if unsaid:
            logger.warning("%s: its config.json cannot express %s, which the run overrides", path, ", ".join(unsaid))
        write_hf(path, tensors, source_hf_dir, dtype, config=None if config == source else config)
    else:
        for _ in tensors:
            continue
    dist.barrier()
