"""TrainingRank: one rank of training, without Ray. It holds a trainer, the device's memory, and a weight sender.

- Used by: `workers.TrainWorker` makes one in its actor and passes its calls on.
- Invariant: all three are complete once it is constructed. Only `load` fills the trainer's weights.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slime.config.args import Args
from slime.core.load_result import LoadResult
from slime.core.rank_batch import RankBatch
from slime.megatron import device
from slime.megatron.offload.trainer_memory import TrainerMemory
from slime.megatron.trainer import Trainer
from slime.megatron.validation_loss import validation_losses
from slime.observability.logs import collected_warnings
from slime.sync.sender import WeightSender


class TrainingRank:
    """One rank of training. All methods are collective over the trainers."""

    def __init__(self, args: Args, *, rank: int, init_method: str) -> None:
        """Build the model and its optimizer; `load` has to follow."""
        self._args = args
        self._trainer = trainer = Trainer(args, rank=rank, world_size=args.actor_world_size, init_method=init_method)
        critics = [] if trainer.critic is None else [trainer.critic]
        self._actor_memory = TrainerMemory(trainer.model, trainer.optimizer)
        self._critic_memory = [TrainerMemory(critic.model, critic.optimizer) for critic in critics]
        self.weights = WeightSender(args, trainer, rank=rank, backend=device.backend_name())
        """This trainer's side of the weight syncs."""

    def load(self) -> tuple[LoadResult, list[str]]:
        """Load the checkpoint, before all other calls; return what was loaded, and warnings."""
        with collected_warnings() as warnings:
            loaded = self._trainer.load()
        self.weights.trained(f"loaded from {loaded.source}")
        if not self._args.num_engines:  # otherwise the first weight sync checks them
            self.weights.check()
        return loaded, warnings

    def train(self, rollout_id: int, part: RankBatch) -> dict[str, float]:
        """Train on a rollout, of which this rank has its `part`; `time/training` is its own wall time in seconds."""
        start = time.perf_counter()
        metrics = self._trainer.train(rollout_id, part, self.weights.version)
        self.weights.trained(f"trained in rollout {rollout_id}")
        return {**metrics, "time/training": time.perf_counter() - start}

    def validate(self, sets: Mapping[str, RankBatch]) -> dict[str, float]:
        """Return the losses of the current weights on each set, as `eval/NAME/...`; nothing of training changes."""
        metrics: dict[str, float] = {}
        for name, part in sets.items():
            start = time.perf_counter()
            share = self._trainer.share(part, 1)
            losses = validation_losses(share, self._trainer.own_log_probs(share))
            losses["time"] = time.perf_counter() - start
            metrics |= {f"eval/{name}/{metric}": value for metric, value in losses.items()}
        return metrics

    def save(self, rollout_id: int, state: dict[str, Any], *, export: bool) -> None:
        """Export with --save-hf (if `export`), then begin to save a checkpoint of this moment.

        The export comes first. A run that is killed in between resumes from the checkpoint before, and exports again.
        """
        if export and self._args.save_hf is not None:
            self._trainer.save_hf(Path(self._args.save_hf.format(rollout_id=rollout_id)))
        self._trainer.begin_save(rollout_id, state)

    def is_writing(self) -> bool:
        """Return whether a checkpoint is being written; not collective."""
        return self._trainer.saver.is_busy

    def finish_save(self) -> tuple[str, float]:
        """Wait until the checkpoint that was begun is complete; return its path, and the seconds that it took."""
        written = self._trainer.saver.finish()
        return str(written.path), written.seconds

    def sleep(self, *, keep_weights: bool) -> None:
        """Give the device's memory back; keep that of the actor's weights if they are sent next."""
        self._actor_memory.offload_optimizer()
        if not keep_weights:
            self._actor_memory.offload_weights()
        for memory in self._critic_memory:  # the critic's weights are sent to no engine
            memory.offload_optimizer()
            memory.offload_weights()

    def wake(self) -> None:
        """Take the device's memory again; no-op if it was not given back."""
        for memory in (self._actor_memory, *self._critic_memory):
            memory.reload()

    def peak_memory(self) -> dict[str, float]:
        """Return the peak memory since the last call, in GB (see `megatron.device`)."""
        return device.take_memory_peaks()
