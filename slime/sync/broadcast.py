"""Weights by process-group broadcast: trainer rank 0 is rank 0, the engines are ranks 1...

Path: after every training round the trainers stream their weights (a collective among them), rank 0 announces each
bucket to all engines over HTTP and broadcasts it at the same time. Invariant: the policy version reaches an engine
with the last bucket only, so an engine that reports it holds all of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

from slime.engine.client import EngineClient
from slime.engine.protocol import WEIGHT_GROUP
from slime.engine.weight_group import WeightGroup, dtype_name, join_weight_group
from slime.sync.stream import NamedTensor, buckets
from slime.sync.transport import SyncReport, Transport

NAMED_WITHIN_S = 20.0
"""Seconds that a failed broadcast waits for the engine's own error."""


class BroadcastTransport(Transport):
    """Joins the weight group; the engines have to reach this process at `address`."""

    def __init__(
        self,
        client: EngineClient,
        *,
        engine_ranks: Sequence[int],
        address: str,
        port: int,
        backend: str,
        bucket_bytes: int,
    ) -> None:
        """`engine_ranks`: how many ranks each engine is, in the order of the client's engines."""
        super().__init__(client, bucket_bytes=bucket_bytes)
        self._group = self._connect(engine_ranks, address, port, backend)

    def _connect(self, engine_ranks: Sequence[int], address: str, port: int, backend: str) -> WeightGroup:
        world_size = 1 + sum(engine_ranks)

        async def both() -> WeightGroup:
            await self._client.forget_weights_update_group(WEIGHT_GROUP)
            group, _ = await asyncio.gather(
                asyncio.to_thread(
                    join_weight_group,
                    master_address=address,
                    master_port=port,
                    rank=0,
                    world_size=world_size,
                    group_name=WEIGHT_GROUP,
                    backend=backend,
                    is_master=True,
                ),
                self._client.init_weights_update_group(
                    master_address=address,
                    master_port=port,
                    world_size=world_size,
                    group_name=WEIGHT_GROUP,
                    backend=backend,
                    engine_ranks=engine_ranks,
                ),
            )
            return group

        return self._runner.run(both())

    def send(self, tensors: Iterable[NamedTensor], *, version: int) -> SyncReport:
        start = time.perf_counter()
        total = 0
        pending: list[NamedTensor] | None = None
        for bucket in buckets(tensors, self._bucket_bytes):
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

        asking = self._client.update_weights_from_distributed(
            names=[name for name, _ in bucket],
            dtypes=[dtype_name(tensor.dtype) for _, tensor in bucket],
            shapes=[list(tensor.shape) for _, tensor in bucket],
            group_name=WEIGHT_GROUP,
            weight_version=None if version is None else str(version),
            flush_cache=version is not None,
        )
        both = [asyncio.ensure_future(asking), asyncio.ensure_future(asyncio.to_thread(broadcast))]
        await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
        if not both[0].done():  # the broadcast has failed: an engine is gone, and the request to it says which
            await asyncio.wait(both[:1], timeout=NAMED_WITHIN_S)
        for each in both:
            if each.done():
                each.result()
        return sum(tensor.nbytes for _, tensor in bucket)

    def close(self) -> None:
        self._group.close()  # first: an engine that still waits for a bucket is freed by it
        self._runner.run(self._client.forget_weights_update_group(WEIGHT_GROUP))
        super().close()
