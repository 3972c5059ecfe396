"""--save-debug-train-data: every tensor that training used, in the order of its computation.

- Used by: `trainer` passes in a rollout's columns before the steps, `step` passes in each step before and after the
  weights change; `tools/diff_steps.py` compares the files.
- Invariant: it changes nothing that is read again, and apart from rounding its files do not depend on the parallel
  layout: tokens are in the batch's order, weights and gradients are whole and have their HF names.

Rank 0 writes; the others take part in gathering. Gradients are those that the optimizer gets: summed over all ranks and
not clipped.

Shapes: _N samples, _T all tokens, _R response tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import megatron.core
import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from torch import Tensor

import slime
from slime.config.args import Args
from slime.core.architecture import Architecture
from slime.core.batch import COLUMNS, Array, TrainBatch
from slime.core.batch import Axis as ColumnAxis
from slime.megatron.model.build import ModelChunks, architecture_of, named_parameters, named_weights, params_dtype
from slime.megatron.model.hf_weights import iter_whole_tensors
from slime.megatron.nan_guard import TokenTrace, whole_traces
from slime.megatron.parallel import Topology, expert_place
from slime.megatron.share import Share
from slime.observability.step_files import (
    LOSS,
    PLACES,
    RESPONSE_LENGTHS,
    TOKEN_LOSS,
    TOTAL_LENGTHS,
    Axis,
    PlaceWriter,
    StepFilesWriter,
)

_AXES = {ColumnAxis.SAMPLE: Axis.SAMPLE, ColumnAxis.TOKEN: Axis.TOKEN, ColumnAxis.RESPONSE: Axis.RESPONSE}


class StepDump:
    """Writes the tensors of a rollout, and then those of each of its steps.

    All methods are collective, also those of the OpenStep that `before_update` returns.
    """

    @classmethod
    def of(cls, args: Args, topology: Topology) -> StepDump | None:
        """Return a dump for --save-debug-train-data, None without the flag."""
        return None if args.save_debug_train_data is None else cls(args, topology, Path(args.save_debug_train_data))

    def __init__(self, args: Args, topology: Topology, directory: Path) -> None:
        """Open `directory` for writing; a ValueError on rank 0 if that is not possible."""
        self._topology = topology
        self._architecture = architecture_of(args)
        self._rollout_id = 0
        self._files = StepFilesWriter(directory, _facts(args, topology)) if topology.rank == 0 else None

    def rollout(self, rollout_id: int, share: Share, used: Mapping[str, Array]) -> None:
        """Write the columns as they came in, then those that training made or changed before its first step."""
        self._rollout_id = rollout_id
        changed = {name for name, values in used.items() if values is not share.own.columns.get(name)}
        raw, whole = share.whole(share.own.columns), share.whole({name: used[name] for name in used})
        if self._files is None:
            return
        self._files.forget_from(rollout_id)
        place = self._files.begin(f"rollout {rollout_id}", rollout_id)
        place.add(TOTAL_LENGTHS, _tensor(raw.total_lengths_N), Axis.SAMPLE)
        place.add(RESPONSE_LENGTHS, _tensor(raw.response_lengths_N), Axis.SAMPLE)
        for name, values in _in_order(raw):
            place.add(name, _tensor(values), _AXES[COLUMNS[name].axis])
        for name, values in _in_order(whole):
            if name in changed:
                title = f"{name} in the loss" if raw.has(name) else name
                place.add(title, _tensor(values), _AXES[COLUMNS[name].axis])
        place.end()

    def before_update(
        self, where: str, model: ModelChunks, reduced: Mapping[str, Tensor], traces: Sequence[TokenTrace], share: Share
    ) -> OpenStep:
        """Write the step's tokens, its loss and its gradients, which are reduced but not clipped.

        Args:
            where: names rollout and step, and ends in `critic` for one of the critic's steps.
            reduced: the step's reduced sums, with `loss`; read on the last stage only.
        """
        found: list[Any] = [None]
        if self._topology.is_last_stage:
            found = [(whole_traces(traces, self._topology, share), float(reduced["loss"]))]
        dist.broadcast_object_list(found, group=self._topology.pp_group, group_src=self._topology.pp_size - 1)
        [(whole, loss)] = found
        place = None if self._files is None else self._files.begin(where, self._rollout_id)
        if place is not None:
            output = "values" if where.endswith("critic") else "log_probs"
            place.add(PLACES, _tensor(whole["places"]), Axis.STEP)
            place.add(output, _tensor(whole["log_probs"]), Axis.STEP)
            place.add(TOKEN_LOSS, _tensor(whole["loss"]), Axis.STEP)
            place.add(LOSS, _number(loss), Axis.ENTRY)
        _gather_gradients(model)
        step = OpenStep(self._architecture, place)
        step.add_gradients({name: cast(Any, parameter).main_grad for name, parameter in named_parameters(model)})
        return step


class OpenStep:
    """A step whose weights have not changed yet. `place` is its writer on rank 0, None on the others."""

    def __init__(self, architecture: Architecture, place: PlaceWriter | None) -> None:
        self._architecture, self._place = architecture, place

    def add_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Write the gradients in the order of the backward pass, which begins at the output."""
        count = self._add_whole("gradient", gradients)
        if self._place is not None:
            self._place.turn(count)

    def after_update(self, model: ModelChunks, gradient_norm: float) -> None:
        """Write the gradient norm and the weights after the step, which are the old ones if it was skipped."""
        if self._place is not None:
            self._place.add("gradient_norm", _number(gradient_norm), Axis.ENTRY)
        self._add_whole("weight", dict(named_weights(model)))
        if self._place is not None:
            self._place.end()

    def _add_whole(self, kind: str, tensors: Mapping[str, Tensor]) -> int:
        """Write tensors in the weight table's order, from the embedding to the output; return how many."""
        count = 0
        for name, tensor in iter_whole_tensors(tensors, self._architecture):
            if self._place is not None:
                self._place.add(f"{kind} {name}", tensor, Axis.ENTRY)
            count += 1
        return count


def _gather_gradients(model: ModelChunks) -> None:
    """Give every rank the whole sum of each gradient.

    With the distributed optimizer, a rank's buffer holds the reduced sum in its own shard only. The other shards still
    hold this rank's contribution to the sum. They are overwritten here with the sums of the other ranks, which is safe:
    the optimizer does not read them, and the next step begins with zeros.
    """
    for chunk in cast(Iterable[DistributedDataParallel], model):
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for bucket_group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
            ranks = bucket_group.intra_distributed_optimizer_instance_group
            for bucket in bucket_group.buckets:
                own = shard_buffer(bucket.grad_data, ranks.size())[ranks.rank()]
                dist.all_gather_into_tensor(bucket.grad_data, own.clone(), group=ranks)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _in_order(batch: TrainBatch) -> list[tuple[str, Array]]:
    return [(name, batch.columns[name]) for name in COLUMNS if batch.has(name)]


def _tensor(values: Array) -> Tensor:
    return torch.from_numpy(np.array(values))  # a copy: what came through Ray cannot be written to


def _facts(args: Args, topology: Topology) -> dict[str, Any]:
    """Return facts about the run that made the numbers, for whoever compares them."""
    return {
        "slime": slime.__version__,
        "megatron-core": megatron.core.__version__,
        "torch": torch.__version__,
        "ranks": topology.world_size,
        "tensor parallel": topology.tp_size,
        "pipeline parallel": topology.pp_size,
        "context parallel": topology.cp_size,
        "data parallel": topology.dp_size,
        "expert parallel": expert_place().ep_size,
        "dtype": str(params_dtype(args)).removeprefix("torch."),
        "deterministic": args.deterministic,
    }
