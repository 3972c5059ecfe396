"""The experts that one rank holds: all first matrices as one parameter, and all second matrices as another.

- Used by: `layers` puts `StackedExperts` into a layer; `build` lists each expert's part under a name of its own.
- Invariant: outside this module every expert has its own weights. Names, checkpoints, exports and weight sync are those
  of Megatron's SequentialMLP, whose weights are one parameter for each expert.

A grouped matrix product reads the matrices of all experts from one tensor, and Megatron's buffers keep one parameter in
one piece of memory. A copy of separate weights in every step would cost as much memory again.

Shapes: t tokens that this rank's experts get, E experts on this rank, F channels of an expert on this rank, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from slime.megatron.model.expert_products import Groups, expert_linear, warn_of_loop, why_not_grouped
from slime.megatron.model.kernels import weighted_swiglu

FIRST, SECOND = "linear_fc1", "linear_fc2"


def run_experts(tokens: Tensor, weights: Tensor, first: Tensor, second: Tensor, groups: Groups) -> Tensor:
    """Run tokens [t, H], sorted by expert, through their experts, and weight each output: [t, H].

    Args:
        weights: [t] float32, the router's weight of each token's expert.
        first: [E, 2 F, H], gate and up.
        second: [E, H, F]
    """
    hidden = weighted_swiglu(expert_linear(tokens, first, groups), weights)
    return expert_linear(hidden, second, groups)


class StackedExperts(SequentialMLP):
    """The experts that this rank holds; tokens arrive sorted by expert.

    Megatron's class builds and initializes them one by one, and here they become two parameters. An expert without
    tokens gets a gradient of zeros.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        experts: Any = self.local_experts
        self.linear_fc1 = _stacked([expert.linear_fc1.weight for expert in experts])
        """[E, 2 F, H], gate and up."""
        self.linear_fc2 = _stacked([expert.linear_fc2.weight for expert in experts])
        """[E, H, F]"""
        del self.local_experts
        if config.expert_tensor_parallel_size != config.tensor_model_parallel_size:
            # Megatron gives expert gradients a group of their own only with expert parallelism. Without it, Megatron
            # would sum them over ranks that hold different parts of an expert, or not sum the copies of one expert.
            for parameter in self.parameters():
                parameter.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
        self.grouped = config.moe_grouped_gemm
        """Whether the experts run as one grouped matrix product."""
        if self.grouped and (reason := why_not_grouped(config.params_dtype, tuple(self.linear_fc2.shape[1:]))):
            warn_of_loop(reason)
            self.grouped = False

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Run tokens [t, H] through their experts, and weight each output with its entry of `permuted_probs` [t].

        Args:
            tokens_per_expert: [E], on any device.
        """
        tokens = permuted_local_hidden_states
        groups = Groups.of(tokens_per_expert, tokens.device, grouped=self.grouped)
        return run_experts(tokens, permuted_probs, self.linear_fc1, self.linear_fc2, groups), None

    def backward_dw(self) -> None:
        """Do nothing: no gradient is delayed."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return what a checkpoint holds: each expert's matrices under the keys that SequentialMLP gives them."""
        alone = bool((metadata or {}).get("singleton_local_shards", False))
        replica = (0, 0, self.dp_group.rank())
        parts: dict[str, Any] = {}
        for name, weight in ((FIRST, self.linear_fc1), (SECOND, self.linear_fc2)):
            build: Any = partial(self._sharded, offsets=tuple(sharded_offsets), alone=alone)
            merge: Any = _merged_halves if name == FIRST else torch.stack
            parts[f"{prefix}{name}"] = ShardedTensorFactory(
                f"{prefix}experts.{name}.weight", weight, build, merge, replica
            )
        return parts

    @torch.no_grad()
    def _sharded(
        self,
        key: str,
        tensor: Tensor,
        replica_id: Any,
        flattened_range: slice | None,
        *,
        offsets: tuple[tuple[int, int, int], ...],
        alone: bool,
    ) -> list[Any]:
        """Return a sharded tensor for each expert, for the first matrix a pair: ranks cut gate and up separately.

        Args:
            key: the parameter's key in the checkpoint; a prefix before it names a state of the optimizer.
            tensor: the parameter, or that state of it.
            alone: each expert and half has a key of its own, instead of an axis or a part of one.
        """
        assert flattened_range is None
        ranks, rank = self.tp_group.size(), self.tp_group.rank()
        experts = self.ep_group.size() * self.num_local_experts
        head, _, matrix = key.rpartition("experts.")
        found: list[Any] = []
        for local, part in enumerate(tensor):
            expert = self.ep_group.rank() * self.num_local_experts + local
            name = f"{head}experts.{expert}.{matrix}" if alone else key
            axes = offsets if alone else (*offsets, (len(offsets), expert, experts))
            sharded = partial(ShardedTensor.from_rank_offsets, replica_id=replica_id, prepend_axis_num=len(axes))
            if not matrix.startswith(FIRST):
                found.append(sharded(name, part, *axes, (len(axes) + 1, rank, ranks)))
                continue
            gate, up = part.chunk(2)
            if alone:
                cut = (len(axes), rank, ranks)
                found.append([sharded(f"{name}_w", gate, *axes, cut), sharded(f"{name}_v", up, *axes, cut)])
            else:  # along one axis: gate of every rank, then up of every rank
                cuts = [(len(axes), place, 2 * ranks) for place in (rank, ranks + rank)]
                found.append([sharded(name, half, *axes, cut) for half, cut in zip((gate, up), cuts, strict=True)])
        return found


def _stacked(weights: list[Any]) -> torch.nn.Parameter:
    """Return the weights [..., ...] of all experts as one parameter [E, ..., ...], with Megatron's marks."""
    parameter = torch.nn.Parameter(torch.stack([weight.detach() for weight in weights]))
    marks = dict(vars(weights[0]))
    if "partition_dim" in marks:
        marks["partition_dim"] += 1  # experts are a new first axis
    vars(parameter).update(marks)
    return parameter


@torch.no_grad()
def _merged_halves(experts: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.cat(halves) for halves in experts])


def of_each_expert(name: str, parameter: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield a parameter by its name; a stacked one as each expert's part, by the name that it has in SequentialMLP.

    A part shares memory with the parameter: its values, and its gradient or `main_grad` if there is one. For example
    "mlp.experts.linear_fc1" of 2 experts becomes "mlp.experts.local_experts.0.linear_fc1.weight" and
    "mlp.experts.local_experts.1.linear_fc1.weight".
    """
    head, _, matrix = name.rpartition(".experts.")
    if matrix not in (FIRST, SECOND):
        yield name, parameter
        return
    main_grad = getattr(parameter, "main_grad", None)
    for expert, values in enumerate(parameter.detach()):
        part: Any = values
        if parameter.grad is not None:
            part.grad = parameter.grad[expert]
        if main_grad is not None:
            part.main_grad = main_grad[expert]
        yield f"{head}.experts.local_experts.{expert}.{matrix}.weight", part
