"""The distributed optimizer's part of a checkpoint: each rank writes and reads what it holds, and nothing is gathered.

- Used by: `optimizer_state`, for saving and for loading.
- Invariant: the shares of all ranks cover every weight's state exactly once, under the names and whole shapes that
  Megatron's other optimizers use. So any layout reads them, and this one reads what any layout wrote.

A rank holds the entries `start` to `stop` of a flattened weight. The format stores boxes, slices along every axis;
those of a matrix are at most three: the rest of a row, whole rows, and the beginning of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes along each axis."""


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes of a tensor of this shape that hold its flat entries `start` to `stop`, in their order."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    while start < stop:
        first, inside = divmod(start, row)
        if inside or stop - start < row:
            end = min(stop, (first + 1) * row)
            for offsets, sizes in boxes(shape[1:], inside, end - first * row):
                yield (first, *offsets), (1, *sizes)
        else:
            end = stop // row * row
            yield (first, *(0 for _ in shape[1:])), (end // row - first, *shape[1:])
        start = end


def flat_shares(
    optimizer: DistributedOptimizer, weights: Mapping[str, Any], prefix: str
) -> dict[int, dict[str, list[ShardedTensor]]]:
    """Return this rank's state as sharded tensors, by the number of the weight and by slot.

    Their data are views of the state itself: what is loaded into them is in the optimizer.

    Args:
        weights: the sharded tensors of the model's weights.
        prefix: the beginning of each tensor's name, before its slot.
    """
    of_weight = {id(part.data): part for part in nested_values(extract_sharded_tensors_and_factories(dict(weights))[0])}
    shares: dict[int, dict[str, list[ShardedTensor]]] = {}
    ranges = [
        (weight, place["param"])
        for buffer in optimizer.gbuf_ranges
        for buckets in buffer.values()
        for bucket in buckets
        for weight, place in bucket["param_map"].items()
    ]
    for number, (weight, place) in enumerate(ranges):
        whole = _pieces(of_weight[id(weight)])
        state = optimizer._get_main_param_and_optimizer_states(weight)
        shares[number] = {
            slot: [
                share
                for begin, piece in whole
                for share in _shares(piece, f"{prefix}{slot}.{piece.key}", tensor.detach(), begin, place, optimizer)
            ]
            for slot, tensor in state.items()
            if slot != "step"  # it is in the common part, once for all weights
        }
    return shares


def _pieces(part: ShardedTensor | ShardedTensorFactory) -> list[tuple[int, ShardedTensor]]:
    """Return the tensors that a weight is stored as, each with its first entry's place in the flattened weight."""
    data = part.data
    assert isinstance(data, Tensor)
    if isinstance(part, ShardedTensor):
        return [(0, part)]
    with torch.no_grad():
        built: Any = part.build_fn(part.key, torch.empty(data.shape, device="meta"), part.replica_id, None)
    pieces = [cast(ShardedTensor, piece) for piece in nested_values(built if isinstance(built, dict) else [*built])]
    for piece in pieces:
        assert piece.data is not None and piece.data.is_contiguous(), f"{piece.key} is stored in parts with gaps"
    return [(int(cast(Tensor, piece.data).storage_offset()), piece) for piece in pieces]


def _shares(
    piece: ShardedTensor, key: str, state: Tensor, begin: int, place: Any, optimizer: DistributedOptimizer
) -> Iterator[ShardedTensor]:
    """Yield the shares of one stored tensor that are in `state`, the entries of `place` of the flattened weight."""
    start, stop = max(place.start, begin), min(place.end, begin + math.prod(piece.local_shape))
    extra = piece.prepend_axis_num
    at = start - place.start
    for offsets, sizes in boxes(tuple(piece.local_shape), start - begin, stop - begin):
        length = math.prod(sizes)
        base = piece.global_offset
        yield ShardedTensor(
            key=key,
            data=state.view(-1)[at : at + length].view((1,) * extra + sizes),
            dtype=state.dtype,
            local_shape=(1,) * extra + sizes,
            global_shape=piece.global_shape,
            global_offset=(*base[:extra], *(a + b for a, b in zip(base[extra:], offsets, strict=True))),
            axis_fragmentations=None,  # the boxes are no regular grid
            # in place of the rank among the weight's replicas: these do not hold the same state
            replica_id=(*_ids(piece)[:2], optimizer.distributed_optimizer_instance_id),
            allow_shape_mismatch=piece.allow_shape_mismatch,
        )
        at += length


def _ids(piece: ShardedTensor) -> tuple[int, ...]:
    assert isinstance(piece.replica_id, tuple) and len(piece.replica_id) == 3, f"(PP, TP, DP): {piece}"
    return piece.replica_id
