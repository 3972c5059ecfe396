"""Weights by process-group broadcast: trainer rank 0 is rank 0 of the group, and the engines are ranks 1...

- Where it sits: after every training round the trainers stream their weights, which is a collective among them. Rank 0
  copies each bucket into one flat tensor, announces it to all engines over HTTP and broadcasts it at the same time.
  While the engines receive a bucket, the trainers gather the next one.
- Invariant: one bucket is announced at a time, so all members take part in the same broadcast. The policy version is
  sent with the last bucket only, so an engine that reports it holds the whole set.

Two threads share the work. The caller's thread gathers tensors and fills buckets on its CUDA stream. The sender's
thread broadcasts on a stream of its own, which first waits for the event that marks a filled bucket. This cannot
deadlock: rank 0 alone is in both the trainers' groups and this group, and the engines wait for nothing else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from slime.core.address import address_for
from slime.core.pausing import PauseChoice
from slime.engine.bucket_layout import BucketLayout, NamedTensor
from slime.engine.client import EngineClient
from slime.engine.protocol import WEIGHT_GROUP
from slime.engine.server_process import find_free_port
from slime.engine.weight_group import Filled, WeightGroup, filled, join_weight_group
from slime.sync.buckets import Bucket, Buckets
from slime.sync.transport import DRAIN_WITHIN_S, Opening, SyncReport, Transport

NAMED_WITHIN_S = 20.0
"""Seconds to wait, after a failed broadcast, for the request whose error names the lost engine."""


@dataclass(frozen=True)
class _FlatBucket:
    """A bucket's bytes in one tensor, and the layout that engines need to split it."""

    flat: Tensor
    filled: Filled
    layout: BucketLayout

    @classmethod
    def of(cls, bucket: Bucket) -> _FlatBucket:
        flat = bucket.layout.flatten(bucket.tensors)
        return cls(flat, filled(flat), bucket.layout)


class BroadcastTransport(Transport):
    """Sends weights by broadcast; the engines have to reach this process at `address`."""

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
        """`engine_ranks` is the number of ranks of each engine, in the order of the client's engines."""
        super().__init__(client, bucket_bytes=bucket_bytes, pause=pause, drain_within=drain_within)
        self._group = self._connect(engine_ranks, address, port, backend)

    @classmethod
    def open(cls, opening: Opening) -> BroadcastTransport:
        """Open it on trainer 0, with all engines in one group."""
        args = opening.args
        address = address_for(opening.engine_urls)
        return cls(
            opening.client(),
            engine_ranks=opening.engine_ranks,
            address=address,
            port=find_free_port(address),
            backend="gloo" if args.engines_on_cpu else opening.backend,
            bucket_bytes=args.update_weight_buffer_size,
            pause=args.update_weight_pause,
            drain_within=args.engine_request_timeout,
        )

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
        """Send all buckets and return their bytes.

        At most two buckets are filled at once: one is being sent, and the next one waits until the stream shows whether
        it is the last (the last one carries the version).
        """
        total = 0
        under_way: Future[None] | None = None
        buckets = Buckets(tensors, self._bucket_bytes)
        for bucket in buckets:
            flat = _FlatBucket.of(bucket)
            total += bucket.layout.num_bytes
            carried = version if buckets.at_end() else None
            if under_way is not None:
                under_way.result()
            under_way = sender.submit(self._send_now, flat, carried)
        if under_way is not None:
            under_way.result()
        return total

    def _send_now(self, bucket: _FlatBucket, version: str | None) -> None:
        self._runner.run(self._send_bucket(bucket, version))

    async def _send_bucket(self, bucket: _FlatBucket, version: str | None) -> None:
        asking = self._client.update_weights_from_distributed(
            names=bucket.layout.names,
            dtypes=bucket.layout.dtypes,
            shapes=bucket.layout.shapes,
            group_name=WEIGHT_GROUP,
            weight_version=version,
            flush_cache=False,  # `paused` has flushed it; SGLang crashes if it flushes with requests in flight
            load_format="flattened_bucket",
        )
        broadcast = asyncio.to_thread(self._group.broadcast, bucket.flat, after=bucket.filled)
        both = [asyncio.ensure_future(asking), asyncio.ensure_future(broadcast)]
        await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
        if not both[0].done():  # the broadcast has failed: an engine is gone, and the failed HTTP request names it
            await asyncio.wait(both[:1], timeout=NAMED_WITHIN_S)
        broken = any(not each.done() or each.exception() is not None for each in both)
        if broken:
            self._group.close(broken=True)  # ends a broadcast that still waits
        for each in both:
            if each.done():
                each.result()

    def leave(self) -> None:
        self._group.close(broken=True)
        super().leave()

    def close(self) -> None:
        async def both() -> None:
            # Run both at once: either side may wait until the other leaves, and an engine may wait for another bucket.
            leaving = asyncio.to_thread(self._group.close)
            forgetting = self._client.forget_weights_update_group(WEIGHT_GROUP)
            results = await asyncio.gather(leaving, forgetting, return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result

        self._runner.run(both())
        super().close()
