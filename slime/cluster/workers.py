"""Ray actors, each a thin shell around a plain class.

- Called by: `Cluster` places the actors on their bundles and calls them. The work is in `training_rank` and
  `engine.launch`.
- Invariant: what an actor raises can be read by the driver (see `portable`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from slime.cluster.on_ray.portable import portable_errors
from slime.config.args import Args
from slime.config.secrets import masker_of
from slime.core.imports import importing
from slime.core.masking import mask_output
from slime.core.rank_batch import RankBatch
from slime.core.threads import THREADS_SLEEP_SOON
from slime.observability.logs import log_to_file

if TYPE_CHECKING:
    from slime.cluster.training_rank import TrainingRank
    from slime.core.load_result import LoadResult


def _build_rank(args: Args, rank: int, init_method: str) -> TrainingRank:
    with importing():
        from slime.cluster.training_rank import TrainingRank

    return TrainingRank(args, rank=rank, init_method=init_method)


@ray.remote
@portable_errors
class TrainWorker:
    """One rank of training, as a Ray actor."""

    def __init__(self, args: Args, rank: int, init_method: str, log_dir: str) -> None:
        for name, value in THREADS_SLEEP_SOON.items():  # torch reads them when it is first imported
            os.environ.setdefault(name, value)
        if args.num_engines and not args.colocate:
            # SGLang sets this for its ranks, and members of one NCCL group have to allocate shared memory alike.
            os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
        self._args = args
        self._log_path = (Path(log_dir), f"trainer-{rank}")
        # Built at the first use, by `load`: an error in an actor's constructor would arrive only as the actor's death.
        self._rank = cache(partial(_build_rank, args, rank, init_method))

    def load(self) -> tuple[LoadResult, list[str]]:
        """Build the trainer and load its checkpoint, before all other calls; return what was loaded, and warnings."""
        log_to_file(*self._log_path, masker := masker_of(self._args))
        mask_output(masker)
        return self._rank().load()

    def train(self, rollout_id: int, part: RankBatch) -> dict[str, float]:
        """Train on a rollout, of which this rank has its `part` (see `TrainingRank.train`)."""
        return self._rank().train(rollout_id, part)

    def validate(self, sets: dict[str, RankBatch]) -> dict[str, float]:
        """Return the loss on each set of examples (see `TrainingRank.validate`)."""
        return self._rank().validate(sets)

    def save(self, rollout_id: int, state: dict[str, Any], *, export: bool) -> None:
        """Export, and begin to save a checkpoint (see `TrainingRank.save`)."""
        self._rank().save(rollout_id, state, export=export)

    def is_writing(self) -> bool:
        """Return whether a checkpoint is being written."""
        return self._rank().is_writing()

    def finish_save(self) -> tuple[str, float]:
        """Wait for the checkpoint, and return its path and seconds (see `TrainingRank.finish_save`)."""
        return self._rank().finish_save()

    def sleep(self, *, keep_weights: bool) -> None:
        """Give the device's memory back; keep that of the weights if they are sent next."""
        self._rank().sleep(keep_weights=keep_weights)

    def wake(self) -> None:
        """Take the device's memory again."""
        self._rank().wake()

    def peak_memory(self) -> dict[str, float]:
        """Return the peak memory since the last call, in GB (see `megatron.device`)."""
        return self._rank().peak_memory()

    def connect_engines(
        self,
        router_url: str,
        engine_urls: Sequence[str],
        engine_ranks: Sequence[int],
        shared_with: Sequence[Sequence[int]] = (),
    ) -> None:
        """Send weights to these engines from now on (see `sync.transport.Opening`)."""
        self._rank().weights.connect(router_url, engine_urls, engine_ranks, shared_with)

    def send_weights(self, version: int) -> dict[str, float]:
        """Send the actor's weights to the engines as `version`, and prove that they arrived; return metrics."""
        return self._rank().weights.send(version)


@ray.remote
@portable_errors
class EngineWorker:
    """Owns one engine process. With Ray's `max_concurrency`, `stop` and other calls run while the engine starts."""

    def __init__(self, args: Args, index: int, log_dir: str, gpu_ids: Sequence[str], *, near: bool) -> None:
        """`near` is true if everything that talks to the engine is on this node."""
        from slime.engine.launch import OwnEngine

        self._args = args
        self._near = near
        self._engine = OwnEngine(
            args, index=index, log_path=Path(log_dir) / f"engine-{index}.log", gpu_ids=tuple(gpu_ids)
        )

    def check(self) -> None:
        """Check that what is installed on this node can be started as the run requires. Raises ValueError."""
        from slime.engine.kinds.kind import kind_of

        check = kind_of(self._args).check
        if check is not None:
            check(self._args)

    def start(self) -> str:
        """Start the engine, and return its URL once it answers."""
        return self._engine.start(self._host())

    def _host(self) -> str:
        """Return the address at which the engine listens: loopback, unless its router is on another machine."""
        from slime.core.address import LOOPBACK, own_address

        if self._args.sglang_router_ip is not None:
            return own_address(self._args.sglang_router_ip)
        return LOOPBACK if self._near else ray.util.get_node_ip_address()

    def restart(self) -> str:
        """End what is left of the engine, start it again, and return its URL once it answers."""
        self._engine.stop()
        return self.start()

    def phase(self) -> str:
        """Return the phase of its start that the engine is in."""
        return self._engine.phase()

    def alive(self) -> bool:
        return self._engine.alive()

    def stop(self) -> None:
        self._engine.stop()
