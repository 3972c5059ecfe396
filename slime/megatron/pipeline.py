"""Communication between pipeline stages whose shapes are known before a pass, so that no message asks for them.

- Used by: `step` passes a `PlannedCommunicator` to Megatron's schedule when there are several stages.
- Invariant: every rank of a pipeline packs the same rows, so it knows the tokens of all micro-batches. The nth tensor
  that a stage sends has the shape of the nth that its neighbour receives.

Packs differ in length. Megatron would send each tensor's shape first, then wait for the device to read it: the host
could never launch work ahead of the device.

Without virtual stages all tensors come in the order of the micro-batches. With virtual stages they come in the order of
Megatron's schedule table. The last stage also sends to the first, because model part c + 1 of the first stage follows
part c of the last. Two stages with two parts each, micro-batches in groups of 2, of 10, 20, 30 and 40 tokens:

    table (micro-batch, part)        (0,0) (1,0) (0,1) (1,1) (2,0) (3,0) (2,1) (3,1)
    stage 0 -> stage 1               10    20    10    20    30    40    30    40
    stage 1 -> stage 0 (part 0 only) 10    20                30    40

Gradients take the same way back, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from slime.megatron.parallel import pipeline_group, tensor_group

_Shape = list[int]
_NOTHING: _Shape = [0, 0, 0]


class PlannedCommunicator(P2PCommunicator):
    """Megatron's communicator for one pass over micro-batches of `num_tokens` tokens on this rank."""

    def __init__(self, config: TransformerConfig, num_tokens: Sequence[int]) -> None:
        super().__init__(pipeline_group(), config)
        stage, last = self.pp_group.rank(), self.pp_group.size() - 1
        all_, turning = tensor_shapes(config, num_tokens, parts=self.virtual_pipeline_model_parallel_size or 1)
        # the link between the last stage and the first carries what goes on to another part of the model
        before, after = (turning if stage == 0 else all_), (turning if stage == last else all_)
        self._planned: dict[str, Iterator[_Shape]] = {
            "activation from the stage before": iter(before),
            "gradient to the stage before": iter(before),
            "activation to the next stage": iter(after),
            "gradient from the next stage": iter(after),
        }

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[_Shape, _Shape]:
        """Return the shapes of the tensors to receive, as Megatron's method does, without a message.

        Raises:
            RuntimeError: a tensor to send has another shape than its receiver expects.
        """
        self._check("activation to the next stage", tensor_send_next)
        self._check("gradient to the stage before", tensor_send_prev)
        return (
            self._next("activation from the stage before") if recv_prev else _NOTHING,
            self._next("gradient from the next stage") if recv_next else _NOTHING,
        )

    def finish(self, *, forward_only: bool) -> None:
        """Check that the pass has sent and received everything that was planned.

        Raises:
            RuntimeError: something is left.
        """
        for what, shapes in self._planned.items():
            left = len(list(shapes))
            if left and not (forward_only and what.startswith("gradient")):
                raise RuntimeError(f"pipeline: the pass has ended, but {left} tensors ({what}) were planned further")

    def _check(self, what: str, tensor: Tensor | None) -> None:
        if tensor is None:
            return
        planned = self._next(what)
        if list(tensor.shape) != planned:
            raise RuntimeError(f"pipeline: {what} has shape {list(tensor.shape)}, but the receiver expects {planned}")

    def _next(self, what: str) -> _Shape:
        shape = next(self._planned[what], None)
        if shape is None:
            raise RuntimeError(f"pipeline: a tensor more than planned ({what})")
        return shape


def tensor_shapes(config: Any, num_tokens: Sequence[int], *, parts: int) -> tuple[list[_Shape], list[_Shape]]:
    """Return the shapes [tokens, 1, hidden] of all tensors between two stages, and of those from the last to the first.

    Args:
        config: Megatron's config, of which sizes and the size of a group of micro-batches are read.
        num_tokens: the tokens of each micro-batch on this rank; sequence parallelism divides them further.
        parts: the model parts (virtual stages) of each stage.
    """
    ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
    shapes = [[tokens // ranks, 1, config.hidden_size] for tokens in num_tokens]
    if parts == 1:
        return shapes, []
    table = get_schedule_table(len(shapes), parts, config.microbatch_group_size_per_vp_stage)
    return [shapes[number] for number, _ in table], [shapes[number] for number, part in table if part < parts - 1]


def groups() -> ProcessGroupCollection:
    """Return the groups that Megatron's schedule uses; it takes a communicator only together with them."""
    found: Any = ProcessGroupCollection()
    found.tp, found.pp = tensor_group(), pipeline_group()
    found.cp = parallel_state.get_context_parallel_group()
    found.embd = parallel_state.get_embedding_group(check_initialized=False)
    found.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    found.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False)
    return found
