"""The critic: a second model next to the policy, with its architecture and layout, that estimates values.

- Used by: `trainer` computes the values of a rollout before its advantages, and takes the critic's steps over the same
  micro-batches as the policy's.
- Invariant: the critic shares no weight, no optimizer and no schedule with the policy. Its checkpoint is a part of the
  policy's, written and read together with it.

Shapes: _B packed tokens, _R response tokens of one micro-batch. The value of a response token is the value of the state
in which it was sampled, so it has the same index as the token's log-prob.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from slime.algo.reducers import sums_of_rows
from slime.algo.values import value_loss
from slime.config.args import Args
from slime.core.columns import Array
from slime.megatron.checkpoint.save_load import CRITIC, FoundCheckpoint, Trained, find_checkpoint, load_checkpoint
from slime.megatron.dump_steps import StepDump
from slime.megatron.microbatch import MicroBatch
from slime.megatron.model import hf_weights
from slime.megatron.model.build import ValueModel, architecture_of, build_model, unwrap
from slime.megatron.nan_guard import BadStepError, StepGuard, TokenTrace
from slime.megatron.optim.optimizer import build_optimizer, follow_schedule, reload_main_weights
from slime.megatron.packs import Packs
from slime.megatron.parallel import Topology
from slime.megatron.share import Share
from slime.megatron.step import ModelSteps, Predicted, WeightedLoss, weighted_sum
from slime.models.hf_files import HFReader


class Critic:
    """The value model with its optimizer, schedule and guard. All methods are collective."""

    def __init__(self, args: Args, topology: Topology, dump: StepDump | None = None) -> None:
        self._args = replace(
            args,
            lr=args.resolved.critic_lr,
            lr_warmup_iters=args.critic_lr_warmup_iters,
            lr_warmup_fraction=None,
            num_critic_only_steps=0,  # it learns in all rollouts
        )
        self.model = build_model(self._args, wrap=True, kind=ValueModel)
        self.optimizer, self.scheduler = build_optimizer(self._args, self.model)
        self._steps = ModelSteps(self.model, topology, dump=dump)
        self._guard = StepGuard(args, topology)

    # Loading and saving

    def start(self, policy: FoundCheckpoint) -> str:
        """Load a new critic from --critic-load, else from what the policy starts from; return the source's path.

        Raises:
            ValueError: there is nothing to load, or it does not fit.
        """
        source = policy if self._args.critic_load is None else find_checkpoint(self._args.critic_load)
        if source is None:
            raise ValueError(
                f"--critic-load {self._args.critic_load}: no checkpoint there; name one, or an HF directory"
            )
        source = source.part(CRITIC) or source
        if source.kind == "hf":
            hf_weights.load_hf_into(self.model, architecture_of(self._args), HFReader(source.path), self._args)
        else:
            load_checkpoint(source, model=self.model)
        reload_main_weights(self.optimizer)
        return str(source.path)

    def resume(self, policy: FoundCheckpoint) -> str:
        """Load the critic that was saved with the policy's checkpoint, or `start` a new one; return the source's path.

        Raises:
            ValueError: the checkpoint has no critic, and no --critic-load names another start.
        """
        saved, args = policy.part(CRITIC), self._args
        if saved is None and args.critic_load is None:
            raise ValueError(
                f"{policy.path} holds no critic: it was saved by a run without one; name what the critic starts from "
                "(--critic-load), or give --finetune to begin a new run with these weights"
            )
        if saved is None:
            return self.start(policy)
        loaded = load_checkpoint(
            saved,
            model=self.model,
            optimizer=None if args.no_load_optim else self.optimizer,
            scheduler=None if args.no_load_optim else self.scheduler,
        )
        if args.no_load_optim:
            reload_main_weights(self.optimizer)
        follow_schedule(self.optimizer, self.scheduler)
        self._guard.load_state_dict((loaded.state or {})["step_guard"])
        return str(saved.path)

    def saved(self) -> Trained:
        """Return what a checkpoint stores of the critic."""
        args = self._args
        return Trained(
            self.model,
            None if args.no_save_optim else self.optimizer,
            None if args.no_save_optim else self.scheduler,
            {"step_guard": self._guard.state_dict()},
        )

    # Values and steps

    def values(self, packs: Packs) -> list[Predicted]:
        """Return the values [R] float32 of each micro-batch; an empty list unless this is the last stage."""
        return self._steps.forward(packs, self._response_values)

    def train(self, packs: Packs, *, share: Share, weights_sum: float, where: str) -> dict[str, float]:
        """Take one optimizer step on the value loss with the policy's loss weights; return `loss`, `clip_fraction`, ...

        Raises:
            RuntimeError: as for `ModelSteps.take_step`; no weight has changed then.
        """
        try:
            return self._steps.take_step(
                packs,
                self._weighted_loss,
                optimizer=self.optimizer,
                scheduler=self.scheduler,
                weights_sum=weights_sum,
                where=f"{where}, critic",
                share=share,
                guard=self._guard,
            )
        except BadStepError as error:
            return self._guard.skipped(error)

    def forget_gradients(self) -> None:
        """Zero the gradients; call this before each step."""
        self._steps.forget_gradients(self.optimizer)

    def _response_values(self, micro_batch: MicroBatch, hidden: Tensor) -> Tensor:
        core = unwrap(self.model[-1])
        assert isinstance(core, ValueModel) and core.value_head is not None, "called on the last stage"
        values = core.value_head(hidden)
        if core.config.sequence_parallel:
            # Every rank continues with all values. In the backward pass each one keeps its own part of their gradient.
            values = tensor_parallel.gather_from_sequence_parallel_region(
                values, tensor_parallel_output_grad=False, group=self._steps.topology.tp_group
            )
        return values.flatten()[micro_batch.predicting_R]

    def _weighted_loss(self, micro_batch: MicroBatch, hidden: Tensor) -> WeightedLoss:
        columns = micro_batch.columns
        values_R, weights_R = self._response_values(micro_batch, hidden), columns["loss_weights"]
        clip = self._args.value_clip or None
        loss_R, metrics = value_loss(values_R, columns["values"], columns["returns"], clip=clip)
        total = weighted_sum(loss_R, weights_R)
        trace = TokenTrace(
            micro_batch.responses_R, values_R.detach(), loss_R.detach(), weights_R, columns["advantages"]
        )
        shares = {name: weighted_sum(metric_R, weights_R) for name, metric_R in metrics.items()}
        shares |= {"loss": total.detach(), "weights": weights_R.double().sum()}
        shares |= {"not_finite": trace.not_finite(), "loss_magnitude": trace.magnitude()}
        return total, (shares, trace)


def critic_metrics(share: Share, columns: Mapping[str, Array], counted_N: Array) -> dict[str, float]:
    """Return metrics of the values from which a rollout's advantages were computed, equal on every rank. Collective."""
    counts_R = (columns["loss_mask"] > 0) & counted_N[share.rows_M].repeat(share.own.response_lengths_N)
    [count] = share.totals(counts_R.sum())
    if not count:
        return {}
    inside_R = torch.from_numpy(counts_R)
    values_R, returns_R = (torch.from_numpy(columns[name]).double() for name in ("values", "returns"))
    lengths_M = torch.from_numpy(share.own.response_lengths_N)
    row_R = torch.repeat_interleave(torch.arange(len(lengths_M)), lengths_M)

    def mean(numbers_R: Tensor) -> float:
        sums_M = sums_of_rows(torch.where(inside_R, numbers_R, 0.0), row_R, len(lengths_M))
        return float(share.all_rows(sums_M).numpy().sum()) / count

    found = {"value_mean": mean(values_R), "return_mean": mean(returns_R)}
    counted = returns_R[inside_R]
    ends = (counted.max().item(), -counted.min().item()) if len(counted) else (-math.inf, -math.inf)
    highest, lowest = share.largest(*ends)
    if highest == -lowest:
        return found
    error_R = returns_R - values_R
    unexplained = mean((error_R - mean(error_R)).square())
    return found | {"explained_variance": 1 - unexplained / mean((returns_R - found["return_mean"]).square())}
