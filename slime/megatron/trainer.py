"""Trainer: one rank of training, without Ray: log-probs -> advantages -> loss -> step.

- Used by: a Ray worker passes in its data-parallel rank's part of each rollout, and sends the weights to engines.
- Invariant: between calls the model holds the actor's weights. A rank's work and memory on the host grow with its own
  tokens and with the number of all rows, not with all tokens.

Shapes: _N samples of the rollout, _R response tokens of the rank's own samples.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from slime.config.args import Args
from slime.config.rollout_plan import parts_of_rollout
from slime.core.batch import TrainBatch
from slime.core.columns import Array
from slime.core.load_result import LoadResult
from slime.core.rank_batch import RankBatch, RankStep
from slime.core.weight_parts import WeightPart
from slime.megatron import device, routing_replay
from slime.megatron.advantages import advantage_columns, counted_rows_of, loss_of, loss_options, loss_weight_columns
from slime.megatron.checkpoint.background import Saver
from slime.megatron.checkpoint.files import refuse_abandoned
from slime.megatron.checkpoint.save_load import FoundCheckpoint, find_checkpoint, load_checkpoint, take_checkpoint
from slime.megatron.checkpoint.search import HF_FILES, HFFiles, find_sound_checkpoint
from slime.megatron.critic import Critic, critic_metrics
from slime.megatron.dump_steps import StepDump
from slime.megatron.microbatch import ContextParallel
from slime.megatron.model import hf_weights
from slime.megatron.model.build import all_weights, architecture_of, build_model, params_dtype
from slime.megatron.nan_guard import BadStepError, StepGuard, check_columns
from slime.megatron.offload.host_memory import Snapshots
from slime.megatron.offpolicy import offpolicy_columns, version_of_weights
from slime.megatron.optim.optimizer import build_optimizer, follow_schedule, reload_main_weights, steps_per_rollout
from slime.megatron.packs import Packs, packs_of
from slime.megatron.parallel import close_parallel, init_parallel
from slime.megatron.share import Share
from slime.megatron.step import Predicted, Stepper, over_steps
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
        self.saver = Saver()

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

    def begin_save(self, rollout_id: int, state: dict[str, Any]) -> None:
        """Begin to write a checkpoint of this moment under --save; `load` returns `state` (see `take_checkpoint`)."""
        args = self._args
        assert args.save is not None, "there is a place for checkpoints"
        take = partial(
            take_checkpoint,
            args.save,
            rollout_id=rollout_id,
            model=self.model,
            optimizer=None if args.no_save_optim else self.optimizer,
            scheduler=None if args.no_save_optim else self.scheduler,
            state=state | self._hf_files.state | {"step_guard": self._guard.state_dict()},
            keep_last=args.keep_last_checkpoints,
            critic=None if self.critic is None else self.critic.saved(),
        )
        self.saver.begin(take)

    def save(self, rollout_id: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint as `begin_save` does, wait until it is complete, and return its path."""
        self.begin_save(rollout_id, state)
        return self.saver.finish().path

    @property
    def params_dtype(self) -> torch.dtype:
        """The dtype of the weights, and of what `iter_hf_tensors` yields."""
        return params_dtype(self._args)

    def save_hf(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Export the actor as an HF directory in `dtype`; None: in the dtype of --hf-checkpoint's files."""
        if self._args.hf_checkpoint is None:
            raise ValueError("--hf-checkpoint is not given: an export takes its config and tokenizer files from there")
        hf_weights.save_hf(path, self.model, self._arch, self._args.hf_checkpoint, dtype=dtype)

    def iter_hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the actor's whole tensors by HF name, in the same order on every rank; iterate to the end."""
        return hf_weights.iter_hf_tensors(self.model, self._arch)

    def weight_parts(self) -> list[WeightPart]:
        """Return this rank's parts of the actor's weights; collective, and valid as long as the trainer lives."""
        return hf_weights.weight_parts(self.model, self._arch)

    def close(self) -> None:
        close_parallel()

    # Training

    def train(
        self, rollout_id: int, batch: TrainBatch | RankBatch, policy_version: int | None = None
    ) -> dict[str, float]:
        """Take all optimizer steps of one rollout; return metrics, which are the same on every rank.

        Args:
            batch: this data-parallel rank's part of the rollout, or on every rank the whole rollout.
            policy_version: the version under which the engines know the trainer's current weights; None if they were
                never sent. Tokens of lower versions are off-policy (see `offpolicy`).

        Raises:
            ValueError: the samples cannot be cut into the requested steps, or off-policy tokens cannot be corrected.
            RuntimeError: loss weights do not add up, or numbers are not finite.
        """
        start = time.perf_counter()
        args = self._args
        self._stepper.forget_gradients(self.optimizer)
        share = self.share(batch, steps_per_rollout(args))
        counted_N = counted_rows_of(args, share.rows)
        version = version_of_weights(args, rollout_id, share, policy_version)
        own = routing_replay.for_actor(args, share)
        made, offpolicy_metrics = offpolicy_columns(args, share, counted_N, version)
        # the own rows' columns by name: first the received ones, then the ones that training computes from them
        columns = own.columns | made | self._predictions(own, share.batch.steps)
        where = f"rollout {rollout_id}"
        check_columns(where, share, columns, counted_N)  # whitening would spread one bad value over all tokens
        made, advantage_metrics = advantage_columns(args, share, columns, counted_N)
        columns |= made
        check_columns(where, share, columns, counted_N, ["advantages"])
        made, sums = loss_weight_columns(args, share, columns, counted_N)
        columns |= made
        if self._dump is not None:
            self._dump.rollout(rollout_id, share, columns)
        train_start = time.perf_counter()
        metrics = self._take_steps(rollout_id, share, columns, sums)
        end = time.perf_counter()
        metrics |= share.batch.metrics | offpolicy_metrics | advantage_metrics
        if self.critic is not None:
            found = critic_metrics(share, columns, counted_N)
            metrics |= {f"critic/{name}": value for name, value in found.items()}
        metrics["train/dropped_samples"] = float((~counted_N).sum())
        forward, step = self._longest([train_start - start, end - train_start])
        metrics |= {"time/train_forward": forward, "time/train_step": step}
        metrics["train/tokens_per_second"] = float(share.rows.total_lengths_N.sum()) / (forward + step)
        return metrics

    def share(self, batch: TrainBatch | RankBatch, num_steps: int) -> Share:
        """Return this rank's share of a rollout, which is cut here if it comes as a whole.

        Raises:
            RuntimeError: the part of another rank has arrived.
        """
        topology = self.topology
        if isinstance(batch, TrainBatch):
            parts = parts_of_rollout(self._args, batch, num_ranks=topology.dp_size, num_steps=num_steps)
            batch = parts[topology.dp_rank]
        if (batch.rank, batch.num_ranks) != (topology.dp_rank, topology.dp_size):
            raise RuntimeError(
                f"trainer {topology.rank} is data-parallel rank {topology.dp_rank} of {topology.dp_size}, and got the "
                f"rows of rank {batch.rank} of {batch.num_ranks}: some rows would be trained on twice and others never"
            )
        return Share(batch, topology.dp_host_group)

    def _predictions(self, own: TrainBatch, steps: Sequence[RankStep]) -> dict[str, Array]:
        """Return what the models predict for the own rows before the first step: log-probs and values, if needed.

        With one step the old policy is the current one, and its log-probs are read from the step's own forward pass;
        but a KL penalty in the reward needs them earlier.
        """
        found: dict[str, Array] = {}
        if self._args.loss_type != "sft_loss" and (len(steps) > 1 or self._args.needs_kl_first):
            found["old_log_probs"] = self._forward(own, steps)
        if self._args.needs_reference:
            with self._snapshots.holding("ref"):
                found["ref_log_probs"] = self._forward(routing_replay.for_others(own), steps)
        if self.critic is not None:
            found["values"] = self._forward(routing_replay.for_others(own), steps, self.critic.values)
        return found

    def _take_steps(
        self, rollout_id: int, share: Share, columns: dict[str, Array], sums: Sequence[float]
    ) -> dict[str, float]:
        """Take the policy's and the critic's steps; only the critic's in the first --num-critic-only-steps rollouts."""
        args = self._args
        batch = TrainBatch(share.own.total_lengths_N, share.own.response_lengths_N, columns)
        learns = self.critic is None or rollout_id >= args.num_critic_only_steps
        steps: list[dict[str, float]] = []
        critic_steps: list[dict[str, float]] = []
        for number, (step, weights_sum) in enumerate(zip(share.batch.steps, sums, strict=True)):
            where = f"rollout {rollout_id}, step {number}"
            if number > 0:
                self._stepper.forget_gradients(self.optimizer)
            if learns:
                try:
                    step_metrics = self._stepper.train(
                        self._packs(batch, [step]),
                        optimizer=self.optimizer,
                        scheduler=self.scheduler,
                        loss=self._loss,
                        options=self._loss_options,
                        weights_sum=weights_sum,
                        where=where,
                        share=share,
                        guard=self._guard,
                    )
                except BadStepError as error:
                    step_metrics = self._guard.skipped(error)
                steps.append(step_metrics)
            if self.critic is not None:
                self.critic.forget_gradients()
                packs = self._packs(routing_replay.for_others(batch), [step])
                critic_steps.append(self.critic.train(packs, share=share, weights_sum=weights_sum, where=where))
        return over_steps(steps, "train") | over_steps(critic_steps, "critic")

    def log_probs(self, batch: TrainBatch, *, model: Literal["actor", "ref"] = "actor") -> Array:
        """Return [R] float32: log-probs of all response tokens at the rollout temperature (SFT's at 1), on every rank.

        Raises:
            ValueError: `model="ref"`, and no reference is kept.
        """
        share = self.share(batch, 1)
        if model == "ref" and "ref" not in self._snapshots:
            raise ValueError(f"no reference model is kept: give {ASKS_FOR_REFERENCE}")
        if model == "actor":
            own_R = self.own_log_probs(share)
        else:
            with self._snapshots.holding("ref"):
                own_R = self._forward(routing_replay.for_others(share.own), share.batch.steps)
        return share.whole({**share.own.columns, "old_log_probs": own_R}).columns["old_log_probs"]

    def own_log_probs(self, share: Share) -> Array:
        """Return the log-probs of the own rows' response tokens by the actor, like `log_probs`."""
        return self._forward(share.own, share.batch.steps)

    def _packs(self, own: TrainBatch, steps: Sequence[RankStep]) -> Packs:
        """Return the micro-batches of these steps; sequence parallelism cuts the tokens of each into TP equal parts."""
        return packs_of(own, steps, arch=self._arch, multiple=self.topology.tp_size, part=self._context)

    @property
    def _context(self) -> ContextParallel:
        topology = self.topology
        return ContextParallel(topology.cp_rank, topology.cp_size, topology.cp_group)

    def _forward(
        self,
        own: TrainBatch,
        steps: Sequence[RankStep],
        forward: Callable[[Packs], list[Predicted]] | None = None,
    ) -> Array:
        """Return [R] log-probs (or what `forward` returns) of the own rows by the current model.

        All ranks that share these rows get all of them, whichever of them has computed which.
        """
        flat = torch.zeros(int(own.response_lengths_N.sum()), dtype=torch.float32, device=self.topology.tensor_device)
        for responses_R, found_R in (forward or self._stepper.log_probs)(self._packs(own, steps)):
            flat[device.send(torch.from_numpy(responses_R))] = found_R.float()
        if self.topology.is_last_stage and self.topology.cp_size > 1:
            dist.all_reduce(flat, group=self.topology.cp_group)  # 0 for tokens of other ranks
        last = self.topology.pp_size - 1
        if last > 0:
            dist.broadcast(flat, group=self.topology.pp_group, group_src=last)
        return flat.cpu().numpy()

    def _longest(self, seconds: list[float]) -> list[float]:
        """Return, for each duration, the longest that any rank took."""
        times = torch.tensor(seconds, dtype=torch.float64, device=self.topology.tensor_device)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        return times.tolist()
