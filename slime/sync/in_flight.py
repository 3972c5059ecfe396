"""Buckets in flight: announce one bucket after another to the engines, and broadcast them in the same order.

- Where it sits: `broadcast` makes one `InFlight` for each sync. Its caller's thread fills buckets; two threads of
  its own announce them over HTTP and broadcast them.
- Invariant: a bucket is announced only after every engine has answered the one before. So no request can overtake
  another, and all members take part in the broadcasts in the same order.

SGLang answers as soon as its GPU has the work to do: receive the bucket, then copy it into the weights. So the next
bucket is announced while the GPU still receives and copies. Time goes down; rank 0 fills buffers 0 and 1 in turn:

    caller's thread          announcing                 broadcasting         an SGLang: its process   its GPU
    fill 0 in buffer 0
    fill 1 in buffer 1       announce 0, answered       broadcast 0          take 0, answer           receive 0
    wait for buffer 0        announce 1, answered       (queues after 0)     take 1, answer           copy 0
    fill 2 in buffer 0                                  broadcast 1                                   receive 1

The embedded engine answers after it has copied a bucket.

Threads: this cannot deadlock, because this rank alone is in both the trainers' groups and the weight group, and the
engines wait for nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from slime.engine.bucket_layout import Place
from slime.engine.client import EngineClient
from slime.engine.connection import encoded
from slime.engine.protocol import UpdateWeightsFromDistributed
from slime.engine.weight_group import WeightGroup
from slime.sync.buckets import FlatBucket

logger = logging.getLogger(__name__)
NAMED_WITHIN_S = 20.0
"""Seconds to wait, after a failed broadcast, for the error that names the lost engine."""


class Announcements:
    """The JSON that announces each bucket, which is made once, because buckets are the same at each sync."""

    def __init__(self, group_name: str) -> None:
        self._group_name = group_name
        self._made: dict[int, tuple[Sequence[Place], bytes]] = {}

    def of(self, bucket: FlatBucket, version: str | None) -> bytes:
        """Return the JSON for a bucket; that of the last bucket names the `version`, if there is one."""
        version = version if bucket.last else None
        known = self._made.get(bucket.number)
        if known is not None and version is None and known[0] == bucket.layout.places:
            return known[1]
        body = encoded(
            UpdateWeightsFromDistributed(
                names=bucket.layout.names,
                dtypes=bucket.layout.dtypes,
                shapes=bucket.layout.shapes,
                group_name=self._group_name,
                weight_version=version,
                flush_cache=False,  # `paused` has flushed it; SGLang crashes if it flushes with requests in flight
                load_format="flattened_bucket",
            )
        )
        if version is None:
            self._made[bucket.number] = (bucket.layout.places, body)
        return body


class InFlight:
    """The buckets of one sync that are under way. Use it in a `with` block, which waits for its threads."""

    def __init__(self, client: EngineClient, runner: asyncio.Runner, group: WeightGroup) -> None:
        self._client = client
        self._runner = runner
        self._group = group
        self._announcing = ThreadPoolExecutor(1, "announcements")
        self._broadcasting = ThreadPoolExecutor(1, "broadcasts")
        self._announced: list[Future[None]] = []
        self._sent: list[Future[None]] = []

    def __enter__(self) -> InFlight:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:  # broadcasts may be under way, which end by themselves or with an engine that is gone
            try:
                self.finish()
            except RuntimeError as other:
                if other is not error:
                    logger.warning("after %r: %r", error, other)
        self._announcing.shutdown()
        self._broadcasting.shutdown()

    def wait_until_free(self, number: int) -> None:
        """Wait until the buffer of bucket `number` may be filled: the bucket two before it has been sent.

        Raises:
            RuntimeError: a bucket could not be sent; if possible, the error names an engine.
        """
        if number >= 2:
            self._announced[number - 2].result()
            if self._sent[number - 2].exception() is not None:
                self._raise()

    def send(self, bucket: FlatBucket, announcement: bytes) -> None:
        """Send a bucket after those before it. Return at once; a failure is raised by one of the other methods."""
        self._announced.append(self._announcing.submit(self._announce, bucket, announcement))

    def finish(self) -> None:
        """Wait until all buckets have been sent and answered. Raises as `wait_until_free`."""
        self._announcing.submit(lambda: self._runner.run(self._end())).result()

    def _raise(self) -> None:
        for each in [*self._announced, *self._sent]:  # an announcement's error comes first: it names an engine
            each.result()

    def _announce(self, bucket: FlatBucket, announcement: bytes) -> None:
        for earlier in self._announced[: bucket.number]:
            if earlier.exception() is not None:  # the group is closed, so engines would wait for a broadcast in vain
                earlier.result()
        self._sent.append(self._broadcasting.submit(lambda: self._group.broadcast(bucket.flat, after=bucket.filled)))
        self._runner.run(self._answered(announcement))

    async def _answered(self, announcement: bytes) -> None:
        """Announce a bucket whose broadcast is under way; wait for the answers, and for the broadcast before it.

        The next bucket needs the buffer of that one.
        """
        asking = asyncio.ensure_future(self._client.update_weights_from_distributed(announcement))
        *before, own = self._broadcasts()
        await self._guarded([asking, *before], [own], naming=[asking])

    async def _end(self) -> None:
        if any(each.exception() is not None for each in self._announced):
            self._raise()
        await self._guarded(self._broadcasts(), (), naming=())

    def _broadcasts(self) -> list[asyncio.Future[None]]:
        """Return the broadcasts that may not have ended: the buffers of earlier ones were filled again."""
        futures = [asyncio.wrap_future(sent) for sent in self._sent[-2:]]
        for each in futures:  # asyncio would log the error of one that nobody looks at any more
            each.add_done_callback(lambda done: done.cancelled() or done.exception())
        return futures

    async def _guarded(
        self,
        work: Sequence[asyncio.Future[None]],
        others: Sequence[asyncio.Future[None]],
        *,
        naming: Sequence[asyncio.Future[None]],
    ) -> None:
        """Wait for all of `work`; if one of it or of the `others` fails, close the group and raise.

        Closing the group ends a broadcast that waits for an engine that is gone. The error of one of `naming` is
        waited for, because it names an engine.
        """
        gone = asyncio.ensure_future(self._client.presence.until_one_is_gone())
        naming = [*naming, gone]
        every = [*naming, *work, *others]
        try:
            while not _any_failed(every) and not all(each.done() for each in work):
                await asyncio.wait([each for each in every if not each.done()], return_when=asyncio.FIRST_COMPLETED)
            if _any_failed(every):
                waiting = [each for each in naming if not each.done()]
                if waiting and not _any_failed(naming):
                    await asyncio.wait(waiting, timeout=NAMED_WITHIN_S, return_when=asyncio.FIRST_EXCEPTION)
                self._group.close(broken=True)
                for each in every:
                    if each.done():
                        each.result()
        finally:
            for each in naming:
                each.cancel()


def _any_failed(futures: Sequence[asyncio.Future[None]]) -> bool:
    return any(each.done() and each.exception() is not None for each in futures)
