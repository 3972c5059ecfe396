"""Megatron's pipeline schedule around a forward pass: log-probs of micro-batches, and one optimizer step over them.

- Used by: `trainer` passes in micro-batches (`Packs`) and calls `log_probs` (old policy, reference model) or `train`.
- Invariant: the step's loss is sum(weight x per-token loss) over all ranks, its weights sum to 1 (this is checked), and
  gradients are summed. So neither the cut into micro-batches nor the distribution over ranks changes loss or gradients.

Gradient accumulation needs no division for that reason. Take a per-token mean over 4 response tokens: each weight is
1/4. Whether the tokens come as 4, as 3 + 1 in two micro-batches, or as 2 + 2 on two ranks, the weighted losses add up
to the same mean. A mean per micro-batch would give the lone token of 3 + 1 three times the weight of the others.

Shapes: _B packed tokens, _R response tokens of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from slime.algo.losses import Loss, LossInputs, LossOptions
from slime.core.columns import COLUMNS, Array
from slime.megatron.compat import cpu_layer
from slime.megatron.dump_steps import StepDump
from slime.megatron.logprobs import response_log_probs
from slime.megatron.microbatch import MicroBatch
from slime.megatron.model import moe
from slime.megatron.model.build import ModelChunks, unwrap
from slime.megatron.nan_guard import StepGuard, TokenTrace
from slime.megatron.optim.optimizer import update
from slime.megatron.packs import Packs
from slime.megatron.parallel import Topology
from slime.megatron.pipeline import PlannedCommunicator, groups
from slime.megatron.share import Share

WEIGHTS_TOLERANCE = 1e-5
"""The sum of the float32 loss weights differs from 1 by less than this."""

METRIC_NAMES = {"kl": "kl_loss"}
"""The metrics of losses that are logged under another name."""


class StepOptions(TypedDict):
    """The arguments of `take_step` that `train` passes on."""

    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    weights_sum: float
    where: str
    share: Share
    guard: StepGuard


Predicted = tuple[Array, Tensor]
"""A micro-batch's `responses_R`, and what a model says about these tokens."""
WeightedLoss = tuple[Tensor, tuple[dict[str, Tensor], TokenTrace]]
"""A micro-batch's share of the step's loss and of its metrics, and the trace of its tokens."""


@dataclass(frozen=True)
class ModelSteps:
    """A wrapped model that is run and trained by a function of its last hidden states."""

    model: ModelChunks
    topology: Topology
    dump: StepDump | None = field(default=None, kw_only=True)
    """Writes a step's tensors, so that runs can be compared."""

    def forward(self, packs: Packs, output_fn: Callable[[MicroBatch, Tensor], Tensor]) -> list[Predicted]:
        """Return `output_fn`'s result for each micro-batch by the current weights; empty unless on the last stage."""

        def collect(micro_batch: MicroBatch, hidden: Tensor) -> Predicted:
            return micro_batch.responses_R, output_fn(micro_batch, hidden)

        self._set_training(False)
        with torch.no_grad():
            return self._schedule(packs, collect, forward_only=True)

    def forget_gradients(self, optimizer: MegatronOptimizer) -> None:
        """Zero the gradients before a step; a GPU does this while the host prepares the step."""
        for chunk in self.model:
            chunk.zero_grad_buffer()  # pyright: ignore[reportCallIssue]
        optimizer.zero_grad()

    def take_step(
        self,
        packs: Packs,
        loss_fn: Callable[[MicroBatch, Tensor], WeightedLoss],
        *,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        weights_sum: float,
        where: str,
        share: Share,
        guard: StepGuard,
    ) -> dict[str, float]:
        """Take one optimizer step over this rank's micro-batches, after `forget_gradients`.

        Every rank passes the same number of micro-batches.

        Args:
            loss_fn: returns a micro-batch's share of the step's loss and of its metrics, and the trace of its tokens.
            weights_sum: the sum that the loss weights of all ranks must have.
            where: names rollout and step in errors.
            share: the rollout, whose samples `guard` names if the step is wrong.

        Returns:
            Metrics, the same on every rank: `loss` (the whole loss that was minimized), `grad_norm`, `lr`, and those of
            `loss_fn`. With auxiliary losses also these, and `token_loss`, the loss without them.

        Raises:
            RuntimeError: the weights do not sum to `weights_sum`.
            BadStepError: the guard refuses the step. In both cases model, optimizer and scheduler are unchanged.
        """

        self._set_training(True)
        found = self._schedule(packs, loss_fn, forward_only=False)
        reduced, traces = self._reduced([shares for shares, _ in found]), [trace for _, trace in found]
        self._add_balancing(reduced)
        dumped = None if self.dump is None else self.dump.before_update(where, self.model, reduced, traces, share)
        # on a GPU nothing waits for these two before the step is launched; the step has no effect if either is wrong
        wrong = self._is_wrong(reduced, weights_sum, guard)
        with cpu_layer.layer():
            norm, left_out = update(optimizer, wrong, guard.limit("grad_norm"))
            moe.move_biases(self.model, left_out)
        if dumped is not None:
            dumped.after_update(self.model, float(norm))
        metrics = self._metrics(reduced)
        used = metrics.pop("weights")
        if abs(used - weights_sum) > WEIGHTS_TOLERANCE:
            raise RuntimeError(
                f"{where}: the loss weights of all ranks' micro-batches sum to {used:.8g}, not to {weights_sum:.8g}: "
                "samples were lost, repeated, or weighted by another denominator on their way into micro-batches"
            )
        metrics["grad_norm"] = float(norm)
        metrics = guard.check(where, share, metrics, traces)
        metrics["lr"] = float(optimizer.param_groups[0]["lr"])
        scheduler.step(1)
        return metrics

    def _set_training(self, training: bool) -> None:
        """Set the mode of all modules; the walk over them takes milliseconds in which a GPU would wait for its step."""
        for chunk in self.model:
            if chunk.training is not training:
                chunk.train(training)

    def _schedule(
        self,
        packs: Packs,
        output_fn: Callable[[MicroBatch, Tensor], Any],
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Run Megatron's schedule; on the last stage `output_fn` gets each micro-batch and its last hidden states.

        It returns the data to collect or, if there is a backward pass, (loss, data). Other stages collect nothing.
        """

        def forward_step(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            micro_batch = next(iterator)
            hidden = model(micro_batch.tokens_B, None, None, packed_seq_params=micro_batch.sequences)
            packs.prepare()

            def finish(hidden: Tensor, non_loss_data: bool = False) -> Any:
                result = output_fn(micro_batch, hidden)
                if non_loss_data:
                    return result
                loss, data = result
                return loss, torch.ones((), dtype=torch.int, device=loss.device), data

            return hidden, finish

        readers = packs.readers(len(self.model))  # each virtual stage runs all of them
        with cpu_layer.layer():
            planned: dict[str, Any] = {}
            if self.topology.pp_size > 1:
                communicator = PlannedCommunicator(unwrap(self.model[0]).config, packs.num_tokens)
                planned = {"p2p_communicator": communicator, "pg_collection": groups()}
            found = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=readers,
                model=list(self.model),
                num_microbatches=len(packs),
                seq_length=packs.num_tokens[0],
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
                **planned,
            )
            if planned:
                planned["p2p_communicator"].finish(forward_only=forward_only)
            return found

    def _reduced(self, shares: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """On the last stage, reduce over micro-batches and data-parallel ranks: sums, and the maximum of `_max`.

        Nothing waits for the result.
        """
        if not self.topology.is_last_stage:
            return {}
        names = list(shares[0])
        values = {name: torch.stack([share[name].double() for share in shares]) for name in names}
        sums = torch.stack([values[name].sum() for name in names])
        maxima = torch.stack([values[name].amax() for name in names])
        dist.all_reduce(sums, group=self.topology.dp_cp_group)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=self.topology.dp_cp_group)
        chosen = zip(names, sums.unbind(), maxima.unbind(), strict=True)
        return {name: largest if name.endswith("_max") else total for name, total, largest in chosen}

    def _add_balancing(self, reduced: dict[str, Tensor]) -> None:
        """Add the auxiliary losses to `reduced` (the last stage's), and their parts to its `loss`; nothing waits.

        Collective over all ranks: each has the losses of its own layers and tokens.
        """
        coefficients = moe.coefficients(unwrap(self.model[0]).config)
        losses = moe.step_losses(self.model, coefficients, self.topology.tensor_device)
        if not losses or not self.topology.is_last_stage:
            return
        reduced["token_loss"] = reduced["loss"]
        for name, coefficient in coefficients.items():
            reduced[name] = losses[name]
            reduced["loss"] = reduced["loss"] + coefficient * losses[name]

    def _is_wrong(self, reduced: Mapping[str, Tensor], weights_sum: float, guard: StepGuard) -> Tensor:
        """Return [] 1 on every rank if loss weights do not sum to `weights_sum` or the loss is bad; nothing waits."""
        wrong = torch.zeros((), device=self.topology.tensor_device)
        if self.topology.is_last_stage:
            wrong = (reduced["weights"] - weights_sum).abs() > WEIGHTS_TOLERANCE
            wrong = wrong | (reduced["not_finite"] > 0) | (reduced["loss_magnitude"] > guard.limit("loss_magnitude"))
            wrong = wrong.float()
        if self.topology.pp_size > 1:
            dist.all_reduce(wrong, op=dist.ReduceOp.MAX, group=self.topology.pp_group)
        return wrong

    def _metrics(self, reduced: Mapping[str, Tensor]) -> dict[str, float]:
        """Return what the last stage has `reduced`, as numbers, on every rank of every stage."""
        metrics: dict[str, float] = {}
        if reduced:
            metrics = dict(zip(reduced, torch.stack(list(reduced.values())).tolist(), strict=True))
        last = self.topology.pp_size - 1
        if last > 0:
            found = [metrics]
            dist.broadcast_object_list(found, group=self.topology.pp_group, group_src=last)
            metrics = found[0]
        if "gap_tokens" in metrics:
            tokens, total = metrics.pop("gap_tokens"), metrics.pop("gap_sum")
            if tokens:
                metrics["logprob_gap_mean"] = total / tokens
            else:  # the current policy made none of these tokens, so there is no gap; a 0 would look like a good one
                metrics.pop("logprob_gap_max")
        return metrics


@dataclass(frozen=True)
class Stepper(ModelSteps):
    """The policy's optimizer steps and log-probs."""

    vocab_size: int
    temperature: float
    chunk_size: int

    def log_probs(self, packs: Packs) -> list[Predicted]:
        """Return the log-probs [R] of each micro-batch by the current weights; empty unless on the last stage."""

        def collect(micro_batch: MicroBatch, hidden: Tensor) -> Tensor:
            return self._response_log_probs(micro_batch, hidden, with_entropy=False)[0]

        return self.forward(packs, collect)

    def train(self, packs: Packs, *, loss: Loss, options: LossOptions, **step: Unpack[StepOptions]) -> dict[str, float]:
        """Run `take_step` with a loss of log-probs.

        Returns:
            Its metrics, the loss's own weighted means, and `logprob_gap_mean/_max`: |old - engine's log-prob| over the
            mask's tokens that the current policy made.
        """
        return self.take_step(packs, lambda packed, hidden: self._weighted_loss(packed, hidden, loss, options), **step)

    def _response_log_probs(
        self, micro_batch: MicroBatch, hidden: Tensor, *, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        core = unwrap(self.model[-1])
        return response_log_probs(
            hidden,
            core.output_weight(),
            micro_batch.predicting_R,
            micro_batch.targets_R,
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            chunk_size=self.chunk_size,
            with_entropy=with_entropy,
            sequence_parallel=core.config.sequence_parallel,
            group=self.topology.tp_group,
        )

    def _weighted_loss(self, micro_batch: MicroBatch, hidden: Tensor, loss: Loss, options: LossOptions) -> WeightedLoss:
        """Return the micro-batch's share of the step's loss and of its metrics, and the trace of its tokens."""
        log_probs_R, entropy_R = self._response_log_probs(micro_batch, hidden, with_entropy=True)
        # with one step per rollout the old policy is the current one, and needs no forward pass of its own
        columns = {"old_log_probs": log_probs_R.detach()} | micro_batch.columns
        named = {f"{name}_R": values_R for name, values_R in columns.items() if COLUMNS[name].loss_input}
        inputs = LossInputs(
            log_probs_R=log_probs_R, entropy_R=entropy_R, sequences=micro_batch.responses, columns=columns, **named
        )
        loss_R, metrics = loss(inputs, options)
        weights_R = columns["loss_weights"]
        total = weighted_sum(loss_R, weights_R)
        shares = {
            METRIC_NAMES.get(name, name): weighted_sum(values_R.detach(), weights_R)
            for name, values_R in metrics.items()
        }
        shares |= {"loss": total.detach(), "weights": weights_R.double().sum()}
        shares |= _gap_shares(columns)
        trace = TokenTrace(
            micro_batch.responses_R, log_probs_R.detach(), loss_R.detach(), weights_R, columns["advantages"]
        )
        shares |= {"not_finite": trace.not_finite(), "loss_magnitude": trace.magnitude()}
        return total, (shares, trace)


def weighted_sum(values_R: Tensor, weights_R: Tensor) -> Tensor:
    """Return sum(weights x values); an entry of weight 0 adds 0, even if its value is nan or infinite."""
    return (torch.where(weights_R > 0, values_R, 0.0) * weights_R).sum()


def over_steps(steps: Sequence[dict[str, float]], kind: str) -> dict[str, float]:
    """Reduce steps to `train/...`: a metric's mean, but the maximum of `_max`, the last lr and all skipped steps."""
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(name for step in steps for name in step):
        values = [step[name] for step in steps if name in step]
        reduce: Callable[[list[float]], float] = (
            max if name.endswith("_max") else (lambda v: v[-1]) if name == "lr" else lambda v: sum(v) / len(v)
        )
        if name == "skipped_steps":
            reduce = sum
        metrics[f"{kind}/{name}"] = reduce(values)
    return metrics


def _gap_shares(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum |old policy's log-prob by the trainer - by the engine|; for the same policy this is only numerical noise."""
    if "rollout_log_probs" not in columns:
        return {}
    mask_R = columns["loss_mask"] > 0
    if "offpolicy" in columns:
        mask_R = mask_R & ~columns["offpolicy"]
    gap_R = torch.where(mask_R, (columns["old_log_probs"] - columns["rollout_log_probs"]).abs(), 0.0)
    largest = gap_R.amax() if len(gap_R) else gap_R.new_zeros(())
    return {"gap_sum": gap_R.sum(), "gap_tokens": mask_R.sum(), "logprob_gap_max": largest}
