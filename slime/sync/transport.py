"""Transport: the base of all weight transports. It sends whole sets of weights and asks engines what they hold.

- Used by: a trainer's `sender` holds one, which `open` has chosen. Trainer rank 0 sends for all (with colocation every
  trainer sends). `broadcast`, `disk` and `colocate` are the ways to send.
- Invariant: when `send` returns, every engine has reported that it holds the whole set under its version; nothing else
  counts as sent. No token is sampled while weights change, and none afterwards from a KV cache of older weights.

The weight-sync handshake. Time goes down; "-->" is an HTTP request, whose answer rank 0 waits for:

    all trainer ranks            trainer rank 0                          engines
    ---------------------------  --------------------------------------  --------------------------------------------
    enter `WeightSender.send`    pause                               --> drain: answer the requests in flight first
      rank > 0: waits in the       waits until engines are idle          abort: answer them now, with a part
      first gather                 (drain, abort) or have paused         in_place, retract: keep them waiting
                                 begin a weight-update session       --> (engines that have sessions)
    gather bucket 1, collective  announce and send bucket 1          --> receive bucket 1, copy it, answer
    gather bucket 2 meanwhile      waits until all have answered
    ...                          announce and send the last bucket,  --> receive it, and report VERSION from now on
    leave                          with VERSION
                                 end the session                     --> make the weights ready for use
                                 continue                            --> generate with the new weights
                                 ask for the version                 --> report VERSION, or the run ends

What unblocks a side that waits:

- Rank 0 in the pause: the engines become idle. An error follows after `drain_within` seconds without progress.
- Rank 0 in a bucket: all engines have answered. An engine that dies fails its request, and the sync ends with an error.
- A rank > 0 in a gather: rank 0 gathers, too. After an error rank 0 runs through the rest of the stream for this reason
  (`sender.WeightSender`). With several pipeline stages or expert ranks see `owners`.
- An engine in a bucket: the broadcast arrives. After an error the group is closed, which ends the broadcast.
- A paused engine after an error: its session is ended within END_WITHIN_S, and it continues within CONTINUE_WITHIN_S.

`disk` has one step instead of the buckets: rank 0 writes the files before the pause, then every engine loads them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch

from slime.config.args import Args
from slime.core.pausing import PauseChoice
from slime.core.weight_parts import WeightPart
from slime.engine.bucket_layout import NamedTensor
from slime.engine.client import EngineClient, EngineError
from slime.engine.keys import Keys

DRAIN_WITHIN_S = 1800.0
POLL_S = 0.05
END_WITHIN_S = 5.0
"""Seconds for engines to end their weight-update sessions after a failed sync."""
CONTINUE_WITHIN_S = 10.0
"""Seconds for engines to continue generation after a failed sync."""
logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class SyncReport:
    """The cost of one sync: wall time in seconds, the seconds of its `parts` by name, and bytes sent to each engine.

    `waited` is the time in seconds before the sync until nothing was in flight.
    """

    seconds: float
    bytes: int
    parts: Mapping[str, float] = field(default_factory=dict[str, float])
    waited: float = 0.0

    def metrics(self) -> dict[str, float]:
        """Return the report under the metrics' names; empty if nothing was sent."""
        if not self.bytes:
            return {}
        result = {
            "sync/seconds": self.seconds,
            "sync/gb": self.bytes / 1e9,
            "sync/gb_per_s": self.bytes / self.seconds / 1e9,
            "sync/waited_seconds": self.waited,
        }
        for name, seconds in self.parts.items():
            result |= {f"sync/{name}_seconds": seconds, f"sync/{name}_gb_per_s": self.bytes / seconds / 1e9}
        return result


@dataclass(frozen=True, kw_only=True)
class Opening:
    """The facts with which a trainer opens a transport: itself, and the engines to send to."""

    args: Args
    rank: int
    """The trainer's rank; rank 0 talks to the engines."""
    dtype: torch.dtype
    """The dtype of the weights in the stream."""
    backend: str
    """The backend of torch.distributed for the trainers' devices: nccl, or gloo on CPUs."""
    router_url: str
    engine_urls: Sequence[str]
    engine_ranks: Sequence[int]
    """The number of ranks of each engine, in the order of the URLs."""
    parts: Sequence[WeightPart] = ()
    """This trainer's parts, if weights are split over pipeline stages or expert ranks; none if not."""
    shared_with: Sequence[Sequence[int]] = ()
    """With colocation: for each engine the trainers on its devices, in the order of the engine's ranks."""

    def client(self) -> EngineClient:
        """Return a client of all engines, which waits for requests in flight for up to --engine-request-timeout."""
        return EngineClient(
            self.router_url,
            engines=self.engine_urls,
            keys=Keys.of(self.args),
            request_timeout=self.args.engine_request_timeout,
        )


class Transport(ABC):
    """The sending side of a weight sync. Closing it closes its `client`."""

    engines_generate: ClassVar[bool] = False
    """Whether engines can generate right after `send`: colocated engines may have no memory for it yet."""
    asks_engines: bool = True
    """Whether this trainer asks the engines after a sync what they hold; exactly one trainer does."""

    def __init__(
        self,
        client: EngineClient,
        *,
        bucket_bytes: int,
        pause: PauseChoice = "drain",
        drain_within: float = DRAIN_WITHIN_S,
    ) -> None:
        """`pause` is what happens to requests in flight. If they are waited for, they have to make progress at least
        every `drain_within` seconds."""
        self._client = client
        self._bucket_bytes = bucket_bytes
        self._pause_choice: PauseChoice = pause
        self._drain_within = drain_within
        self._runner = asyncio.Runner()

    @classmethod
    @abstractmethod
    def open(cls, opening: Opening) -> Transport:
        """Open this trainer's side of it. Collective over the trainers if its row says that every trainer sends."""

    @abstractmethod
    def send(self, tensors: Iterable[NamedTensor], *, version: int) -> SyncReport:
        """Send all `tensors`, to the end of the iterable; the engines then report `version`.

        Raises:
            RuntimeError: an engine refused them, or did not answer; the error names the engine.
        """

    @contextmanager
    def paused(self) -> Iterator[float]:
        """Stop all engines from generating inside the block, so that weights may change; yield the seconds it took.

        `core.pausing` describes what happens to requests in flight. With drain and abort no answer mixes two versions;
        with in_place and retract an answer names the later version.

        Raises:
            RuntimeError: requests were in flight, and no engine made progress for `drain_within` seconds.
        """
        start = time.perf_counter()
        try:
            self._runner.run(self._pause())
            yield time.perf_counter() - start
        except BaseException:
            self._runner.run(self._try_within(CONTINUE_WITHIN_S, self._client.continue_()))
            raise
        self._runner.run(self._client.continue_())

    @contextmanager
    def updating(self) -> Iterator[float]:
        """Pause as `paused` does, and open a weight-update session at every engine that has them; yield the seconds.

        Buckets may be sent inside the block. The sessions are closed in every case; an engine that cannot close its
        session makes the sync fail.
        """
        with self.paused() as waited:
            try:
                self._runner.run(self._client.update_sessions.begin())
                yield waited
                self._runner.run(self._client.update_sessions.end())
            except BaseException:
                self._runner.run(self._try_within(END_WITHIN_S, self._client.update_sessions.end_left_open()))
                raise

    async def _pause(self) -> None:
        choice = self._pause_choice
        if choice in ("in_place", "retract"):  # requests keep no shared cache then, so there is nothing to flush
            await self._client.pause(choice)
            return
        clock, progress = self._client.clock, self._client.progress
        moved = looked = clock.time()
        if choice == "abort":
            await self._client.pause("abort")
        while not await self._idle_and_paused(paused=choice == "abort"):
            now = clock.time()
            if now - looked >= min(progress.every, self._drain_within / 4):
                looked = now
                moved = now if await progress.look() else moved
            if now - moved > self._drain_within:
                raise RuntimeError(
                    "weight sync: engines have requests in flight, and have made no progress for "
                    f"{self._drain_within:g} s (--engine-request-timeout); --update-weight-pause drain waits for them; "
                    "abort, in_place and retract do not wait"
                )
            await asyncio.sleep(POLL_S)

    async def _idle_and_paused(self, *, paused: bool) -> bool:
        """Return whether nothing is in flight, no engine starts a request, and no cache of earlier weights is left.

        Only an idle engine flushes its cache, so a successful flush proves that it is idle. A request may still arrive
        between the first flush and the pause. The second flush would fail then, and all engines continue.
        """
        if not await self._flushed():
            return False
        if paused:
            return True
        await self._client.pause("in_place")
        if await self._flushed():
            return True
        await self._client.continue_()
        return False

    async def _flushed(self) -> bool:
        try:
            await self._client.flush_cache()
        except EngineError as error:
            if error.status != 400:
                raise
            return False
        return True

    async def _try_within(self, seconds: float, asking: Awaitable[None]) -> None:
        """Ask engines to clean up after a failure; some may be gone, so a request that fails is only logged."""
        try:
            await asyncio.wait_for(asking, seconds)
        except (EngineError, TimeoutError) as error:
            logger.warning("cleaning up after the failed weight sync: %r", error)

    def checksums(self) -> dict[str, str]:
        """Return each engine's own checksum of its weights, by URL."""
        return self._runner.run(self._by_url(self._client.weights_checksum))

    def versions(self) -> dict[str, str]:
        """Return the policy version that each engine reports, by URL."""
        return self._runner.run(self._by_url(self._client.weight_versions))

    def prompt_log_probs(self, tokens: list[int]) -> dict[str, list[float]]:
        """Return each engine's log-probs of the prompt `tokens` except the first token, by URL."""
        return self._runner.run(self._by_url(lambda: self._client.prompt_log_probs(tokens)))

    async def _by_url(self, ask: Callable[[], Awaitable[list[T]]]) -> dict[str, T]:
        return dict(zip(await self._client.workers(), await ask(), strict=True))

    def load_from_disk(self, path: str, *, version: int, engines: Collection[str] | None = None) -> None:
        """Make all engines, or those with these URLs, forget their weights and load the HF directory `path`."""

        async def reload() -> None:
            await self._client.reset_weights(engines)
            await self._client.update_weights_from_disk(path, str(version), engines)

        with self.paused():
            self._runner.run(reload())

    def leave(self) -> None:
        """Close without a request to the engines, which may be gone."""
        Transport.close(self)

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


class NullTransport(Transport):
    """The transport of a trainer that sends nothing, because another one does or there are no engines yet."""

    asks_engines = False

    def __init__(self) -> None:
        super().__init__(EngineClient("", engines=()), bucket_bytes=0)

    @classmethod
    def open(cls, opening: Opening) -> NullTransport:
        return cls()

    def send(self, tensors: Iterable[NamedTensor], *, version: int) -> SyncReport:
        """Take part in gathering every tensor, which the trainers that do send need."""
        drain(tensors)
        return SyncReport(seconds=0.0, bytes=0)


def drain(tensors: Iterable[NamedTensor]) -> None:
    """Run through a stream to its end, because gathering each of its tensors is collective over the trainers."""
    for _ in tensors:
        continue
