"""Trainer: one rank of training, without Ray: log-probs -> advantages -> loss -> step.

- Used by: a Ray worker passes in the TrainBatch of each whole rollout, on every rank, and sends the weights to engines.
- Invariant: between calls the model holds the actor's weights, and every rank makes the same plan from the same batch.

Shapes: _N samples, _R response tokens of all samples.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from slime.config.args import Args
from slime.config.pipeline_stages import count_multiple
from slime.core.batch import TrainBatch
from slime.core.checkpoint_names import RUN, RUN_FILE
from slime.core.columns import Array
from slime.core.load_result import LoadResult
from slime.core.packing import StepPlan, plan_steps, training_flops
from slime.megatron import routing_replay
from slime.megatron.advantages import advantage_columns, counted_rows_of, loss_of, loss_options, loss_weight_columns
from slime.megatron.checkpoint.files import refuse_abandoned
from slime.megatron.checkpoint.save_load import FoundCheckpoint, find_checkpoint, load_checkpoint, save_checkpoint
from slime.megatron.checkpoint.search import HF_FILES, HFFiles, find_sound_checkpoint
from slime.megatron.critic import Critic, critic_metrics
from slime.megatron.dump_steps import StepDump
from slime.megatron.microbatch import ContextParallel, MicroBatch, pack_rows
from slime.megatron.model import hf_weights
from slime.megatron.model.build import all_weights, architecture_of, build_model, params_dtype
from slime.megatron.nan_guard import BadStepError, StepGuard, check_columns
from slime.megatron.offload.host_memory import Snapshots
from slime.megatron.offpolicy import offpolicy_columns, version_of_weights
from slime.megatron.optim.optimizer import build_optimizer, follow_schedule, reload_main_weights, steps_per_rollout
from slime.megatron.parallel import close_parallel, init_parallel
from slime.megatron.step import Stepper, over_steps
from slime.models.hf_files import HFReader

logger = logging.getLogger(__name__)

ASKS_FOR_REFERENCE = "--use-kl-loss with --kl-loss-coef > 0, --kl-coef > 0, --log-ref-kl, or a teacher"


class Trainer:
    """The model, its optimizer, and the path from a rollout's batch to new weights.

    All methods are collective: every rank calls them in the same order, with the same arguments.
    """

    def __init__(self, args: Args, *, rank: int, world_size: int, init_method: str) -> None:
        self._args = args
        self._arch = architecture_of(args)
        self.topology = init_parallel(args, rank=rank, world_size=world_size, init_method=init_method)
        self.model = build_model(args, wrap=True)
        self.optimizer, self.scheduler = build_optimizer(args, self.model)
        self._snapshots = Snapshots(partial(all_weights, self.model))
        self._dump = StepDump.of(args, self.topology)
        self._stepper = Stepper(
            self.model,
            self.topology,
            dump=self._dump,
            vocab_size=self._arch.vocab_size,
            # SFT learns from tokens that were not sampled: there is no temperature to match
            temperature=1.0 if args.loss_type == "sft_loss" else args.rollout_temperature,
            chunk_size=args.resolved.log_probs_chunk_size,
        )
        self._loss, self._loss_options = loss_of(args), loss_options(args)
        self._hf_files = HFFiles(args)
        self._guard = StepGuard(args, self.topology)
        self.critic = Critic(args, self.topology, self._dump) if args.uses_critic else None

    # Loading and saving

    def load(self) -> LoadResult:
        """Load the reference from --ref-load, and the actor from --load, or from --ref-load if --load is empty.

        Raises:
            ValueError: there is nothing to load, or it does not fit.
        """
        args = self._args
        if args.needs_reference:
            self._load_weights(self._find_reference(ASKS_FOR_REFERENCE))
            self._snapshots.take("ref")
        elif args.use_kl_loss and self.topology.rank == 0:
            logger.info("reference KL off: --kl-loss-coef is 0 (--log-ref-kl would still log it)")
        own = (args.save_debug_rollout_data, args.save_debug_train_data, args.save_hf, args.update_weight_disk_dir)
        here = (
            args.load is not None and args.save is not None and Path(args.load).resolve() == Path(args.save).resolve()
        )
        found = find_sound_checkpoint(args.load, step=args.ckpt_step, own=own, sets_aside=here)
        result = self._load_actor(found) if found is not None else self._start_from_reference()
        if args.save is not None and args.num_rollout != 0:
            refuse_abandoned(args.save, result.next_rollout_id)
        return result

    def _find_reference(self, needed_by: str) -> FoundCheckpoint:
        """Find --ref-load; --hf-checkpoint only if no reference is named."""
        args = self._args
        found = find_checkpoint(args.hf_checkpoint if args.ref_load is None else args.ref_load)
        if found is not None:
            return found
        if args.ref_load is not None:
            raise ValueError(f"--ref-load {args.ref_load}: no checkpoint there; name one, or an HF directory")
        raise ValueError(f"{needed_by}: there is no reference model; give --ref-load, or --hf-checkpoint")

    def _start_from_reference(self) -> LoadResult:
        load = self._args.load
        why = "no --load" if load is None else f"--load {load} has no checkpoint"
        if self._args.distills:  # the reference is the teacher
            why = f"{why}: the student starts from --hf-checkpoint"
            reference = find_checkpoint(self._args.hf_checkpoint)
            if reference is None:
                raise ValueError(f"{why}, and --hf-checkpoint {self._args.hf_checkpoint} has no weights; name a model")
            self._load_weights(reference)
            return LoadResult(0, None, f"{reference.path} ({why})")
        reference = self._find_reference(why)
        self._load_weights(reference)
        if self.critic is not None:
            self.critic.start(reference)
        return LoadResult(0, None, f"{reference.path} ({why}: starting from the reference)")

    def _load_actor(self, found: FoundCheckpoint) -> LoadResult:
        args = self._args
        if found.kind != "iteration" or args.finetune:
            self._load_weights(found)
            if self.critic is not None:
                self.critic.start(found)
            return LoadResult(0, None, str(found.path))
        self._hf_files.refuse_others(found)
        if self.critic is not None:
            self.critic.resume(found)
        loaded = load_checkpoint(
            found,
            model=self.model,
            optimizer=None if args.no_load_optim else self.optimizer,
            scheduler=None if args.no_load_optim else self.scheduler,
            load_rng=not args.no_load_rng,
        )
        if not args.no_load_optim and "scheduler" not in loaded.loaded:
            raise ValueError(
                f"{found.path} was saved with --no-save-optim: it holds neither optimizer nor learning-rate schedule; "
                "give --no-load-optim to continue with new ones"
            )
        if args.no_load_optim:
            reload_main_weights(self.optimizer)
        follow_schedule(self.optimizer, self.scheduler)
        state = {key: value for key, value in (loaded.state or {}).items() if key != HF_FILES}
        if "step_guard" in state:
            self._guard.load_state_dict(state.pop("step_guard"))
        return LoadResult(loaded.next_rollout_id, state, str(loaded.path))

    def _load_weights(self, found: FoundCheckpoint) -> None:
        if found.kind == "hf":
            hf_weights.load_hf_into(self.model, self._arch, HFReader(found.path), self._args)
        else:
            load_checkpoint(found, model=self.model)
        reload_main_weights(self.optimizer)

    def save(self, rollout_id: int, state: dict[str, Any]) -> Path:
        """Write a complete checkpoint under --save; `load` returns `state` (JSON-able).

        The entry RUN of the state is written as a file of its own, which `load` does not return.
        """
        args = self._args
        if args.save is None:
            raise ValueError("--save is not given: there is no place for a checkpoint")
        return save_checkpoint(
            args.save,
            rollout_id=rollout_id,
            model=self.model,
            optimizer=None if args.no_save_optim else self.optimizer,
            scheduler=None if args.no_save_optim else self.scheduler,
            state={key: value for key, value in state.items() if key != RUN}
            | self._hf_files.state
            | {"step_guard": self._guard.state_dict()},
            keep_last=args.keep_last_checkpoints,
            critic=None if self.critic is None else self.critic.saved(),
            texts={RUN_FILE: json.dumps(state[RUN])} if RUN in state else {},
        )

    @property
    def params_dtype(self) -> torch.dtype:
        """The dtype of the model's weights, and of what `iter_hf_tensors` yields."""
        return params_dtype(self._args)

    def save_hf(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Export the actor as an HF directory in `dtype`; None: in the dtype of --hf-checkpoint's files."""
        if self._args.hf_checkpoint is None:
            raise ValueError("--hf-checkpoint is not given: an export takes its config and tokenizer files from there")
        hf_weights.save_hf(path, self.model, self._arch, self._args.hf_checkpoint, dtype=dtype)

    def iter_hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the actor's whole tensors by HF name, in the same order on every rank; iterate to the end."""
        return hf_weights.iter_hf_tensors(self.model, self._arch)

    def close(self) -> None:
        close_parallel()

    # Training

    def train(self, rollout_id: int, batch: TrainBatch, policy_version: int | None = None) -> dict[str, float]:
        """Take all optimizer steps of one rollout; return metrics, which are the same on every rank.

        Args:
            policy_version: the version under which the engines know the trainer's current weights; None if they were
                never sent. Tokens of lower versions are off-policy (see `offpolicy`).

        Raises:
            ValueError: the samples cannot be cut into the requested steps, or off-policy tokens cannot be corrected.
            RuntimeError: loss weights do not add up, or numbers are not finite.
        """
        start, raw_batch = time.perf_counter(), batch
        args = self._args
        self._stepper.forget_gradients(self.optimizer)
        counted_N = counted_rows_of(args, raw_batch)
        version = version_of_weights(args, rollout_id, raw_batch, policy_version)
        batch = routing_replay.for_actor(args, raw_batch)
        made, offpolicy_metrics = offpolicy_columns(args, batch, counted_N, version)
        plans = self.plan(batch, steps_per_rollout(args))
        # all columns by name: first the rollout's own, then those that training computes from the earlier ones
        columns = batch.columns | made | self._predictions(batch, plans)
        where = f"rollout {rollout_id}"
        check_columns(where, batch, columns, counted_N)  # whitening would spread one bad value over all tokens
        made, advantage_metrics = advantage_columns(args, batch, columns, counted_N)
        columns |= made
        check_columns(where, batch, columns, counted_N, ["advantages"])
        made, sums = loss_weight_columns(args, batch, columns, counted_N, [plan.rows for plan in plans])
        batch = TrainBatch(batch.total_lengths_N, batch.response_lengths_N, columns | made)
        if self._dump is not None:
            self._dump.rollout(rollout_id, raw_batch, batch)
        train_start = time.perf_counter()
        metrics = self._take_steps(rollout_id, batch, plans, sums)
        end = time.perf_counter()
        metrics |= self._plan_metrics(batch, plans) | offpolicy_metrics | advantage_metrics
        if self.critic is not None:
            metrics |= {f"critic/{name}": value for name, value in critic_metrics(batch, counted_N).items()}
        metrics["train/dropped_samples"] = float((~counted_N).sum())
        forward, step = self._longest([train_start - start, end - train_start])
        metrics |= {"time/train_forward": forward, "time/train_step": step}
        metrics["train/tokens_per_second"] = float(batch.total_lengths_N.sum()) / (forward + step)
        return metrics

    def _predictions(self, batch: TrainBatch, plans: Sequence[StepPlan]) -> dict[str, Array]:
        """Return what the models predict for the whole rollout before its first step: log-probs and values, if needed.

        With one step the old policy is the current one, and its log-probs are read from the step's own forward pass;
        but a KL penalty in the reward needs them earlier.
        """
        found: dict[str, Array] = {}
        if self._args.loss_type != "sft_loss" and (len(plans) > 1 or self._args.needs_kl_first):
            found["old_log_probs"] = self._forward(batch, plans)
        if self._args.needs_reference:
            with self._snapshots.holding("ref"):
                found["ref_log_probs"] = self._forward(routing_replay.for_others(batch), plans)
        if self.critic is not None:
            found["values"] = self._forward(routing_replay.for_others(batch), plans, self.critic.values)
        return found

    def _take_steps(
        self, rollout_id: int, batch: TrainBatch, plans: Sequence[StepPlan], sums: Sequence[float]
    ) -> dict[str, float]:
        """Take the policy's and the critic's steps; only the critic's in the first --num-critic-only-steps rollouts."""
        args = self._args
        learns = self.critic is None or rollout_id >= args.num_critic_only_steps
        steps: list[dict[str, float]] = []
        critic_steps: list[dict[str, float]] = []
        for number, (plan, weights_sum) in enumerate(zip(plans, sums, strict=True)):
            where = f"rollout {rollout_id}, step {number}"
            if number > 0:
                self._stepper.forget_gradients(self.optimizer)
            if learns:
                try:
                    step_metrics = self._stepper.train(
                        self._pack(batch, plan),
                        optimizer=self.optimizer,
                        scheduler=self.scheduler,
                        loss=self._loss,
                        options=self._loss_options,
                        weights_sum=weights_sum,
                        where=where,
                        batch=batch,
                        guard=self._guard,
                    )
                except BadStepError as error:
                    step_metrics = self._guard.skipped(error)
                steps.append(step_metrics)
            if self.critic is not None:
                self.critic.forget_gradients()
                packed = self._pack(routing_replay.for_others(batch), plan)
                critic_steps.append(self.critic.train(packed, batch=batch, weights_sum=weights_sum, where=where))
        return over_steps(steps, "train") | over_steps(critic_steps, "critic")

    def log_probs(self, batch: TrainBatch, *, model: Literal["actor", "ref"] = "actor") -> Array:
        """Return [R] float32: log-probs of all response tokens at the rollout temperature (SFT's at 1), on every rank.

        Raises:
            ValueError: `model="ref"`, and no reference is kept.
        """
        plans = self.plan(batch, 1)
        if model == "actor":
            return self._forward(batch, plans)
        if "ref" not in self._snapshots:
            raise ValueError(f"no reference model is kept: give {ASKS_FOR_REFERENCE}")
        with self._snapshots.holding("ref"):
            return self._forward(routing_replay.for_others(batch), plans)

    def plan(self, batch: TrainBatch, num_steps: int) -> list[StepPlan]:
        """Plan which rows each rank takes, in which micro-batches, by --max-tokens-per-gpu or --micro-batch-size."""
        args = self._args
        return plan_steps(
            batch.total_lengths_N.tolist(),
            num_steps=num_steps,
            dp_size=self.topology.dp_size,
            max_tokens=self._max_tokens,
            micro_batch_size=args.micro_batch_size,
            multiple=self._context.pack_multiple(self._multiple),
            row_multiple=self._context.row_multiple,
            balance=args.balance_data,
            flops=training_flops(self._arch),
            count_multiple=count_multiple(args),
        )

    @property
    def _max_tokens(self) -> int | None:
        """The token budget of one micro-batch, over its context-parallel ranks; None without dynamic batches."""
        args = self._args
        if not args.use_dynamic_batch_size:
            return None
        if args.max_tokens_per_gpu is None:
            raise ValueError("--use-dynamic-batch-size: --max-tokens-per-gpu is not given; give the token budget")
        return args.max_tokens_per_gpu * self.topology.cp_size

    @property
    def _multiple(self) -> int:
        """The multiple of each rank's tokens, because sequence parallelism cuts them into TP equal parts."""
        return self.topology.tp_size

    @property
    def _context(self) -> ContextParallel:
        topology = self.topology
        return ContextParallel(topology.cp_rank, topology.cp_size, topology.cp_group)

    def _pack(self, batch: TrainBatch, plan: StepPlan) -> list[MicroBatch]:
        tokens = sum(int(batch.total_lengths_N[rows].sum()) for ranks in plan.micro_batches for rows in ranks if rows)
        return [
            pack_rows(batch, rows, arch=self._arch, multiple=self._multiple, part=self._context, step_tokens=tokens)
            for rows in plan.micro_batches[self.topology.dp_rank]
        ]

    def _forward(
        self,
        batch: TrainBatch,
        plans: Sequence[StepPlan],
        forward: Callable[[Sequence[MicroBatch]], list[Tensor]] | None = None,
    ) -> Array:
        """Return [R] log-probs (or what `forward` returns) of the whole batch by the current model, on every rank."""
        flat = np.zeros(int(batch.response_lengths_N.sum()), dtype=np.float32)
        micro_batches = [micro_batch for plan in plans for micro_batch in self._pack(batch, plan)]
        found = (forward or self._stepper.log_probs)(micro_batches)
        if self.topology.is_last_stage:
            for micro_batch, found_R in zip(micro_batches, found, strict=True):
                flat[micro_batch.responses_R] = found_R.cpu().numpy()
        whole = torch.from_numpy(flat).to(self.topology.tensor_device)  # 0 for tokens of other ranks
        last = self.topology.pp_size - 1
        if self.topology.is_last_stage:
            dist.all_reduce(whole, group=self.topology.dp_cp_group)
        if last > 0:
            dist.broadcast(whole, group=self.topology.pp_group, group_src=last)
        return whole.cpu().numpy()

    def _longest(self, seconds: list[float]) -> list[float]:
        """Return, for each duration, the longest that any rank took."""
        times = torch.tensor(seconds, dtype=torch.float64, device=self.topology.tensor_device)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        return times.tolist()

    def _plan_metrics(self, batch: TrainBatch, plans: Sequence[StepPlan]) -> dict[str, float]:
        lengths = batch.total_lengths_N.tolist()
        metrics = {"train/num_micro_batches": float(sum(plan.num_micro_batches for plan in plans))}
        if self._max_tokens is not None:
            fills = [plan.fill(lengths, self._max_tokens) for plan in plans]
            metrics["train/fill"] = sum(fills) / len(fills)
        if self.topology.dp_size > 1:
            flops = training_flops(self._arch)
            metrics["train/dp_imbalance"] = max(plan.imbalance(lengths, flops) for plan in plans)
        return metrics
