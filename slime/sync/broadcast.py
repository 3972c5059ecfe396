"""Weights by process-group broadcast: trainer rank 0 is rank 0 of the group, and the engines are ranks 1...

- Where it sits: after every training round the trainers stream their weights, which is a collective among them. Rank 0
  copies them into two flat buffers in turn, and `in_flight` announces and broadcasts each. While the engines receive a
  bucket, the trainers gather the next one.
- Invariant: all members take part in the same broadcasts in the same order. The policy version is sent with the last
  bucket only, so an engine that reports it holds the whole set.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

from slime.core.address import address_for
from slime.core.pausing import PauseChoice
from slime.engine.bucket_layout import NamedTensor
from slime.engine.client import EngineClient
from slime.engine.protocol import WEIGHT_GROUP
from slime.engine.server_process import find_free_port
from slime.engine.weight_group import WeightGroup, join_weight_group
from slime.sync.buckets import FlatBuckets
from slime.sync.in_flight import Announcements, InFlight
from slime.sync.transport import DRAIN_WITHIN_S, Opening, SyncReport, Transport


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
        group_name: str = WEIGHT_GROUP,
    ) -> None:
        """`engine_ranks` is the number of ranks of each engine, in the order of the client's engines."""
        super().__init__(client, bucket_bytes=bucket_bytes, pause=pause, drain_within=drain_within)
        self._group_name = group_name
        self._buckets: dict[int, tuple[FlatBuckets, Announcements]] = {}
        """The buckets of each part of the weights, by its number; whole weights are part 0."""
        self._group = self._connect(engine_ranks, address, port, backend)

    @classmethod
    def open(cls, opening: Opening) -> BroadcastTransport:
        """Open it on trainer 0, with all engines in one group."""
        return cls.of(opening, WEIGHT_GROUP)

    @classmethod
    def of(cls, opening: Opening, group_name: str) -> BroadcastTransport:
        """Open it on any trainer, as rank 0 of a group of that name with all engines."""
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
            group_name=group_name,
        )

    def _connect(self, engine_ranks: Sequence[int], address: str, port: int, backend: str) -> WeightGroup:
        world_size = 1 + sum(engine_ranks)

        async def both() -> WeightGroup:
            await self._client.forget_weights_update_group(self._group_name)
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
                    engine_ranks=engine_ranks,
                ),
            )
            return group

        return self._runner.run(both())

    def send(self, tensors: Iterable[NamedTensor], *, version: int) -> SyncReport:
        start = time.perf_counter()
        with self.updating() as waited:
            total = self.send_part(tensors, part=0, version=version)
        return SyncReport(seconds=time.perf_counter() - start - waited, bytes=total, waited=waited)

    def send_part(self, tensors: Iterable[NamedTensor], *, part: int, version: int | None) -> int:
        """Send a part of the weights to engines that are paused and in a session; return its bytes.

        The last part of a set names the `version`. `part` is its number, under which its buckets are the same at each
        sync. Raises as `send`.
        """
        if part not in self._buckets:
            self._buckets[part] = (FlatBuckets(self._bucket_bytes), Announcements(self._group_name))
        buckets, announcements = self._buckets[part]
        total = 0
        with InFlight(self._client, self._runner, self._group) as under_way:
            for bucket in buckets.fill(tensors, wait_until_free=under_way.wait_until_free):
                under_way.send(bucket, announcements.of(bucket, None if version is None else str(version)))
                total += bucket.layout.num_bytes
            under_way.finish()
        return total

    def leave(self) -> None:
        self._group.close(broken=True)
        super().leave()

    def close(self) -> None:
        async def both() -> None:
            # Run both at once: either side may wait until the other leaves, and an engine may wait for another bucket.
            leaving = asyncio.to_thread(self._group.close)
            forgetting = self._client.forget_weights_update_group(self._group_name)
            results = await asyncio.gather(leaving, forgetting, return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result

        self._runner.run(both())
        super().close()
