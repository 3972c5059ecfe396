"""Weights by process-group broadcast: trainer rank 0 is rank 0, the engines are ranks 1...

Path: after every training round the trainers stream their weights (a collective among them), rank 0 lays each bucket
into one piece of memory, announces it to all engines over HTTP and broadcasts it at the same time; while the engines
take it, the next one is gathered. Invariants: one bucket is announced at a time, so all members are in the same
broadcast; the policy version reaches an engine with the last bucket only, so an engine that reports it holds all.

Two threads: the caller's gathers and fills buckets on its CUDA stream, the sender's broadcasts on one of its own,
behind the event that says a bucket is filled. Rank 0 alone is in the trainers' groups and in this one, and the engines
wait for nothing else, so no order of the two can make a circle.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from slime.engine.client import EngineClient
from slime.engine.protocol import WEIGHT_GROUP
from slime.engine.weight_group import Filled, WeightGroup, dtype_name, filled, flatten_bucket, join_weight_group
from slime.sync.stream import NamedTensor, buckets
from slime.sync.transport import DRAIN_WITHIN_S, PauseChoice, SyncReport, Transport

NAMED_WITHIN_S = 20.0
"""Seconds that a failed broadcast waits for the engine's own error."""


@dataclass(frozen=True)
class _Bucket:
    """Tensors behind each other in one, and what the engines have to know of it."""

    flat: Tensor
    filled: Filled
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]

    @classmethod
    def of(cls, tensors: Sequence[NamedTensor]) -> _Bucket:
        flat = flatten_bucket([tensor for _, tensor in tensors])
        return cls(
            flat=flat,
            filled=filled(flat),
            names=[name for name, _ in tensors],
            dtypes=[dtype_name(tensor.dtype) for _, tensor in tensors],
            shapes=[list(tensor.shape) for _, tensor in tensors],
        )


class BroadcastTransport(Transport):
    """Joins the weight group; the engines have to reach this process at `address`."""

    engines_generate = True

    def __init__(
        self,
        client: EngineClient,
        *,
        engine_ranks: Sequence[int],
        address: str,
        port: int,
        backend: str,
        bucket_bytes: int,
        pause: PauseChoice = "drain",
        drain_within: float = DRAIN_WITHIN_S,
    ) -> None:
        """`engine_ranks`: how many ranks each engine is, in the order of the client's engines."""
        super().__init__(client, bucket_bytes=bucket_bytes, pause=pause, drain_within=drain_within)
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
        with self.updating() as waited, ThreadPoolExecutor(1, "weights") as sender:
            total = self._send_all(tensors, sender, str(version))
        return SyncReport(seconds=time.perf_counter() - start - waited, bytes=total, waited=waited)

    def _send_all(self, tensors: Iterable[NamedTensor], sender: ThreadPoolExecutor, version: str) -> int:
        """Returns the bytes sent. Besides the bucket on its way, one waits until it is known whether it is the last."""
        total = 0
        under_way: Future[None] | None = None
        waiting: _Bucket | None = None

        def submit(bucket: _Bucket, version: str | None) -> Future[None]:
            if under_way is not None:
                under_way.result()
            return sender.submit(lambda: self._runner.run(self._send_bucket(bucket, version)))

        for tensors_of_one in buckets(tensors, self._bucket_bytes):
            if waiting is not None:
                under_way = submit(waiting, None)
            waiting = _Bucket.of(tensors_of_one)
            total += waiting.flat.nbytes
        assert waiting is not None, "the model has no weights"
        submit(waiting, version).result()
        return total

    async def _send_bucket(self, bucket: _Bucket, version: str | None) -> None:
        asking = self._client.update_weights_from_distributed(
            names=bucket.names,
            dtypes=bucket.dtypes,
            shapes=bucket.shapes,
            group_name=WEIGHT_GROUP,
            weight_version=version,
            flush_cache=False,  # `paused` has seen to it; with requests in flight SGLang would not survive it
            load_format="flattened_bucket",
        )
        broadcast = asyncio.to_thread(self._group.broadcast, bucket.flat, after=bucket.filled)
        both = [asyncio.ensure_future(asking), asyncio.ensure_future(broadcast)]
        await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
        if not both[0].done():  # the broadcast has failed: an engine is gone, and the request to it says which
            await asyncio.wait(both[:1], timeout=NAMED_WITHIN_S)
        broken = any(not each.done() or each.exception() is not None for each in both)
        if broken:
            self._group.close(broken=True)  # ends the broadcast where it still waits
        for each in both:
            if each.done():
                each.result()

    def leave(self) -> None:
        self._group.close(broken=True)
        super().leave()

    def close(self) -> None:
        async def both() -> None:
            # at once: either side's leaving may wait for the other's, and an engine for a bucket that never comes
            leaving = asyncio.to_thread(self._group.close)
            forgetting = self._client.forget_weights_update_group(WEIGHT_GROUP)
            results = await asyncio.gather(leaving, forgetting, return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result

        self._runner.run(both())
        super().close()
