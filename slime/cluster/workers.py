"""Ray actors, each a thin shell over a plain class.

Path: `Cluster` makes them on their bundles and calls them; the work is in `megatron.trainer`, `sync` and
`engine.launch`. Invariant: an actor holds no logic of its own; what it raises can be pickled.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.observability.logs import collected_warnings, log_to_file

if TYPE_CHECKING:
    from slime.engine.launch import ManagedProcess
    from slime.megatron.result import LoadResult
    from slime.sync.transport import Transport


@ray.remote
class TrainWorker:
    """One rank of training."""

    def __init__(self, args: Args, rank: int, init_method: str, log_dir: str) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the engine's; read when torch is first imported
        self._args = args
        self._rank = rank
        self._init_method = init_method
        self._log_dir = Path(log_dir)
        self._transport: Transport | None = None
        self._proven = False

    def load(self) -> tuple[LoadResult, list[str]]:
        """Build the trainer and load its checkpoint. Comes before all other calls. The second part are warnings."""
        log_to_file(self._log_dir, f"trainer-{self._rank}")
        from slime.megatron.trainer import Trainer

        args = self._args
        self._trainer = Trainer(args, rank=self._rank, world_size=args.actor_world_size, init_method=self._init_method)
        with collected_warnings() as warnings:
            return self._trainer.load(), warnings

    def train(self, rollout_id: int, batch: TrainBatch) -> dict[str, float]:
        """Train on the whole rollout's `batch`; `time/training` is this rank's own wall seconds."""
        start = time.perf_counter()
        metrics = self._trainer.train(rollout_id, batch)
        return {**metrics, "time/training": time.perf_counter() - start}

    def save(self, rollout_id: int, state: dict[str, Any]) -> str:
        path = self._trainer.save(rollout_id, state)
        if self._args.save_hf is not None:
            self._trainer.save_hf(Path(self._args.save_hf.format(rollout_id=rollout_id)))
        return str(path)

    def connect_engines(self, router_url: str, engine_urls: Sequence[str], engine_ranks: Sequence[int]) -> None:
        """Rank 0 opens the transport of weights; the others only take part in gathering."""
        if self._rank != 0:
            return
        from slime.core.address import address_for
        from slime.engine.client import EngineClient
        from slime.engine.launch import find_free_port
        from slime.megatron import device
        from slime.sync.broadcast import BroadcastTransport
        from slime.sync.disk import DiskTransport

        args = self._args
        client = EngineClient(router_url, engines=engine_urls, api_key=args.sglang.get("api_key"))
        bucket_bytes = args.update_weight_buffer_size
        if args.update_weight_transport == "disk":
            assert args.hf_checkpoint is not None, "the engines serve it"
            self._transport = DiskTransport(
                client,
                directory=self._weight_directory,
                source_hf_dir=args.hf_checkpoint,
                dtype=self._trainer.params_dtype,
                bucket_bytes=bucket_bytes,
            )
            return
        address = address_for(engine_urls)
        self._transport = BroadcastTransport(
            client,
            engine_ranks=engine_ranks,
            address=address,
            port=find_free_port(address),
            backend=device.backend_name(),
            bucket_bytes=bucket_bytes,
        )

    @property
    def _weight_directory(self) -> Path:
        assert self._args.update_weight_disk_dir is not None, "resolving the arguments sets it"
        return Path(self._args.update_weight_disk_dir)

    def send_weights(self, version: int) -> dict[str, float]:
        """Send the actor's weights to the engines as `version`, and prove that they arrived. Collective."""
        from slime.sync.proof import check_versions

        tensors = self._trainer.iter_hf_tensors()
        if self._transport is None:
            for _ in tensors:
                continue  # the other ranks' part of each gather
            report = None
        else:
            report = self._transport.send(tensors, version=version)
            check_versions(self._transport, version=version)
        if self._args.check_weight_sync and not self._proven:
            self._prove(version)
            self._proven = True
        return {} if report is None else report.metrics()

    def _prove(self, version: int) -> None:
        from slime.sync.proof import prove_weights
        from slime.sync.weight_directory import PROOF

        directory = self._weight_directory / PROOF
        # in the dtype in which the weights were sent; the HF directory's own may hold fewer bits
        self._trainer.save_hf(directory, dtype=self._trainer.params_dtype)
        if self._transport is not None:
            try:
                prove_weights(self._transport, directory, version=version)
            finally:
                shutil.rmtree(directory)


@ray.remote
class EngineWorker:
    """Owns one engine process."""

    def __init__(self, args: Args, index: int, log_dir: str) -> None:
        self._args = args
        self._index = index
        self._log_path = Path(log_dir) / f"engine-{index}.log"
        self._process: ManagedProcess | None = None

    def start(self) -> str:
        """Start the engine; its URL, once it answers."""
        from slime.core.address import LOOPBACK, own_address
        from slime.engine.launch import find_free_port, launch_engine

        router_host = self._args.sglang_router_ip
        host = LOOPBACK if router_host is None else own_address(router_host)
        self._process = launch_engine(
            self._args, index=self._index, host=host, port=find_free_port(host), log_path=self._log_path
        )
        self._process.wait_ready(self._args.engine_start_timeout)
        return self._process.url

    def alive(self) -> bool:
        return self._process is not None and self._process.alive()

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()
