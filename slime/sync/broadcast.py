"""Weights by process-group broadcast: trainer rank 0 is rank 0, the engines are ranks 1...

Path: after every training round the trainers stream their weights (a collective among them), rank 0 announces each
bucket to all engines over HTTP and broadcasts it at the same time. Invariant: the policy version reaches an engine
with the last bucket only, so an engine that reports it holds all of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass

from slime.engine.client import EngineClient
from slime.engine.weight_group import WeightGroup, dtype_name, join_weight_group
from slime.sync.stream import NamedTensor, buckets


@dataclass(frozen=True)
class SyncReport:
    """What one sync cost: wall seconds and bytes sent to each engine."""

    seconds: float
    bytes: int

    def metrics(self) -> dict[str, float]:
        return {"sync/seconds": self.seconds, "sync/gb_per_s": self.bytes / self.seconds / 1e9}


class BroadcastTransport:
    """The sending side; lives in trainer rank 0 for the whole run."""

    def __init__(self, client: EngineClient, *, num_engine_ranks: int, address: str, port: int, backend: str) -> None:
        self._client = client
        self._runner = asyncio.Runner()
        self._group_name = "slime-weights"
        self._group = self._connect(num_engine_ranks + 1, address, port, backend)

    def _connect(self, world_size: int, address: str, port: int, backend: str) -> WeightGroup:
        async def both() -> WeightGroup:
            group, _ = await asyncio.gather(
                asyncio.to_thread(
                    join_weight_group,
                    master_address=address,
                    master_port=port,
                    rank=0,
                    world_size=world_size,
                    group_name=self._group_name,
                    backend=backend,
                    is_master=True,
                ),
                self._client.init_weights_update_group(
                    master_address=address,
                    master_port=port,
                    world_size=world_size,
                    group_name=self._group_name,
                    backend=backend,
                ),
            )
            return group

        return self._runner.run(both())

    def send(self, tensors: Iterable[NamedTensor], *, version: int, bucket_bytes: int) -> SyncReport:
        """Send all `tensors`; the engines then report `version`.

        Raises:
            EngineError: an engine refused a bucket (an unknown name, a wrong shape, an incomplete set).
        """
        start = time.perf_counter()
        total = 0
        pending: list[NamedTensor] | None = None
        for bucket in buckets(tensors, bucket_bytes):
            if pending is not None:
                total += self._runner.run(self._send_bucket(pending, version=None))
            pending = bucket
        assert pending is not None, "the model has no weights"
        total += self._runner.run(self._send_bucket(pending, version=version))
        return SyncReport(seconds=time.perf_counter() - start, bytes=total)

    async def _send_bucket(self, bucket: list[NamedTensor], version: int | None) -> int:
        def broadcast() -> None:
            for _, tensor in bucket:
                self._group.broadcast(tensor, src=0)

        await asyncio.gather(
            asyncio.to_thread(broadcast),
            self._client.update_weights_from_distributed(
                names=[name for name, _ in bucket],
                dtypes=[dtype_name(tensor.dtype) for _, tensor in bucket],
                shapes=[list(tensor.shape) for _, tensor in bucket],
                group_name=self._group_name,
                weight_version=None if version is None else str(version),
                flush_cache=version is not None,
            ),
        )
        return sum(tensor.nbytes for _, tensor in bucket)

    def checksums(self) -> list[str]:
        """The engines' own checksums of their weights, one an engine."""
        return self._runner.run(self._client.weights_checksum())

    def versions(self) -> list[str]:
        """The policy version that each engine reports."""
        return self._runner.run(self._client.weight_versions())

    def load_from_disk(self, path: str, *, version: int) -> None:
        """Let every engine forget its weights and load the HF directory `path`."""

        async def reload() -> None:
            await self._client.reset_weights()
            await self._client.update_weights_from_disk(path, weight_version=str(version))

        self._runner.run(reload())

    def close(self) -> None:
        self._group.close()
        self._runner.run(self._client.close())
        self._runner.close()
