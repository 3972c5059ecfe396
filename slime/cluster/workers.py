"""Ray actors, each a thin shell around a plain class.

- Called by: `Cluster` places the actors on their bundles and calls them. The work is in `megatron.trainer`, `sync` and
  `engine.launch`.
- Invariant: what an actor raises can be pickled.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from slime.config.args import Args
from slime.config.secrets import masker_of
from slime.core.batch import TrainBatch
from slime.core.masking import mask_output
from slime.core.threads import THREADS_SLEEP_SOON
from slime.engine.keys import Keys
from slime.observability.logs import collected_warnings, log_to_file

if TYPE_CHECKING:
    from torch import Tensor

    from slime.core.load_result import LoadResult
    from slime.megatron.offload.trainer_memory import TrainerMemory
    from slime.sync.transport import Transport


TRACKERS_OF_MEGATRON = ("wandb", "torch.utils.tensorboard")


@contextmanager
def without(*modules: str) -> Iterator[None]:
    """Make imports of `modules` fail inside the block as if they were not installed, unless imported before.

    Megatron imports trackers for timers that this project does not use. That takes half of Megatron's import time, and
    W&B leaves its temporary directories when an actor is ended.
    """
    hidden = [name for name in modules if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name)


@ray.remote
class TrainWorker:
    """One rank of training, as a Ray actor."""

    def __init__(self, args: Args, rank: int, init_method: str, log_dir: str) -> None:
        for name, value in THREADS_SLEEP_SOON.items():  # torch reads them when it is first imported
            os.environ.setdefault(name, value)
        if args.num_engines and not args.colocate:
            # SGLang sets this for its ranks, and members of one NCCL group have to allocate shared memory alike.
            os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
        self._args = args
        self._rank = rank
        self._init_method = init_method
        self._log_dir = Path(log_dir)
        self._transport: Transport | None = None
        self._memory: TrainerMemory | None = None
        self._critic_memory: TrainerMemory | None = None
        self._proven = False
        self._policy_version: int | None = None
        self._weights_from = ""
        """The source of the actor's weights, for errors."""

    def load(self) -> tuple[LoadResult, list[str]]:
        """Build the trainer and load its checkpoint, before all other calls; return what was loaded, and warnings."""
        log_to_file(self._log_dir, f"trainer-{self._rank}", masker := masker_of(self._args))
        mask_output(masker)
        with without(*TRACKERS_OF_MEGATRON):
            from slime.megatron.trainer import Trainer

        args = self._args
        self._trainer = Trainer(args, rank=self._rank, world_size=args.actor_world_size, init_method=self._init_method)
        with collected_warnings() as warnings:
            loaded = self._trainer.load()
        self._weights_from = f"loaded from {loaded.source}"
        if not args.num_engines:  # otherwise the first weight sync checks them
            for _ in self._finite_tensors():
                continue
        return loaded, warnings

    def train(self, rollout_id: int, batch: TrainBatch) -> dict[str, float]:
        """Train on the whole rollout's `batch`; `time/training` is this rank's own wall time in seconds."""
        start = time.perf_counter()
        metrics = self._trainer.train(rollout_id, batch, self._policy_version)
        self._weights_from = f"trained in rollout {rollout_id}"
        return {**metrics, "time/training": time.perf_counter() - start}

    def save(self, rollout_id: int, state: dict[str, Any]) -> str:
        """Export with --save-hf, then save a checkpoint, and return the checkpoint's path.

        The export comes first. A run that is killed in between resumes from the checkpoint before, and exports again.
        """
        if self._args.save_hf is not None:
            self._trainer.save_hf(Path(self._args.save_hf.format(rollout_id=rollout_id)))
        return str(self._trainer.save(rollout_id, state))

    def sleep(self, *, keep_weights: bool) -> None:
        """Give the device's memory back; keep that of the weights if they are sent next."""
        if self._memory is None:
            from slime.megatron.offload.trainer_memory import TrainerMemory

            self._memory = TrainerMemory(self._trainer.model, self._trainer.optimizer)
            critic = self._trainer.critic
            self._critic_memory = None if critic is None else TrainerMemory(critic.model, critic.optimizer)
        self._memory.offload_optimizer()
        if not keep_weights:
            self._memory.offload_weights()
        if self._critic_memory is not None:  # the critic's weights are sent to no engine
            self._critic_memory.offload_optimizer()
            self._critic_memory.offload_weights()

    def wake(self) -> None:
        """Take the device's memory again."""
        for memory in (self._memory, self._critic_memory):
            if memory is not None:
                memory.reload()

    def peak_memory(self) -> dict[str, float]:
        """Return the peak memory since the last call, in GB (see `megatron.device`)."""
        from slime.megatron import device

        return device.take_memory_peaks()

    def connect_engines(
        self,
        router_url: str,
        engine_urls: Sequence[str],
        engine_ranks: Sequence[int],
        shared_with: Sequence[Sequence[int]] = (),
    ) -> None:
        """Open the transport of weights on rank 0; the other ranks only take part in gathering.

        `shared_with` names for each engine the trainers on its devices; if it is given, each trainer has a transport. A
        transport that was opened before is left without a word to its engines, because some of them may be gone.
        """
        if self._transport is not None:
            self._transport.leave()
            self._transport = None
        self._proven = False
        if shared_with:
            from slime.sync.colocate import connect

            self._transport = connect(
                router_url,
                engine_urls,
                shared_with,
                rank=self._rank,
                engines_on_cpu=self._engines_on_cpu,
                keys=Keys.of(self._args),
                bucket_bytes=self._args.update_weight_buffer_size,
            )
            return
        if self._rank != 0:
            return
        from slime.core.address import address_for
        from slime.engine.client import EngineClient
        from slime.engine.server_process import find_free_port
        from slime.megatron import device
        from slime.sync.broadcast import BroadcastTransport
        from slime.sync.disk import DiskTransport

        args = self._args
        client = EngineClient(
            router_url, engines=engine_urls, keys=Keys.of(args), request_timeout=args.engine_request_timeout
        )
        bucket_bytes = args.update_weight_buffer_size
        if args.update_weight_transport == "disk":
            assert args.hf_checkpoint is not None, "the engines serve it"
            self._transport = DiskTransport(
                client,
                directory=self._weight_directory,
                source_hf_dir=args.hf_checkpoint,
                dtype=self._trainer.params_dtype,
                bucket_bytes=bucket_bytes,
                pause=args.update_weight_pause,
                drain_within=args.engine_request_timeout,
            )
            return
        address = address_for(engine_urls)
        self._transport = BroadcastTransport(
            client,
            engine_ranks=engine_ranks,
            address=address,
            port=find_free_port(address),
            backend="gloo" if self._engines_on_cpu else device.backend_name(),
            bucket_bytes=bucket_bytes,
            pause=args.update_weight_pause,
            drain_within=args.engine_request_timeout,
        )

    @property
    def _engines_on_cpu(self) -> bool:
        """Whether the engines run on the CPU: the run's own embedded ones do; external ones are like the trainer."""
        return self._args.rollout_engine == "embedded" and not self._args.rollout_external_engines

    @property
    def _weight_directory(self) -> Path:
        assert self._args.update_weight_disk_dir is not None, "resolving the arguments sets it"
        return Path(self._args.update_weight_disk_dir)

    def send_weights(self, version: int) -> dict[str, float]:
        """Send the actor's weights to the engines as `version`, and prove that they arrived. Collective."""
        from slime.sync.proof import check_versions

        self._policy_version = version
        tensors = self._finite_tensors()
        if self._engines_on_cpu:  # makes no copy if the trainer is on the CPU, too
            tensors = ((name, tensor.cpu()) for name, tensor in tensors)
        if self._transport is None:
            for _ in tensors:
                continue  # takes part in each gather, for the other ranks
            report = None
        else:
            try:
                report = self._transport.send(tensors, version=version)
            except RuntimeError:
                for _ in tensors:
                    continue  # an engine was lost, but the other ranks' gathers still need this one
                raise
            if self._rank == 0:
                check_versions(self._transport, version=version)
        if self._args.check_weight_sync and not self._proven:
            self._prove(version)
            self._proven = True
        return {} if report is None else report.metrics()

    def _finite_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Return the actor's whole tensors under their HF names. Collective; raises RunError if one is not finite."""
        from slime.sync.finite import finite

        return finite(self._trainer.iter_hf_tensors, described=lambda: f"the actor's weights, {self._weights_from}")

    def _prove(self, version: int) -> None:
        from slime.sync.proof import prove_weights
        from slime.sync.weight_directory import PROOF

        directory = self._weight_directory / PROOF
        # Use the dtype in which the weights were sent; the HF directory's own may hold fewer bits.
        self._trainer.save_hf(directory, dtype=self._trainer.params_dtype)
        if self._transport is not None and self._rank == 0:
            try:
                prove_weights(self._transport, directory, version=version)
            finally:
                shutil.rmtree(directory)


@ray.remote
class EngineWorker:
    """Owns one engine process. Ray's `max_concurrency` lets calls, also `stop`, through while the engine starts."""

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
