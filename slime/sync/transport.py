"""The part that all weight transports share: send whole sets of weights, and ask the engines what they hold.

Path: trainer rank 0 holds one for the whole run; `broadcast`, `disk` and `colocate` are the ways to send. Invariants:
when `send` returns, every engine has said that it holds the whole set under its version, and nothing else counts as
sent; no token is made while weights change, and none later from a cache that earlier weights have made.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar

from slime.engine.client import EngineClient, EngineError
from slime.sync.stream import NamedTensor

PauseChoice = Literal["drain", "abort", "in_place", "retract"]
"""What becomes of requests in flight when weights change, as --update-weight-pause has it."""
DRAIN_WITHIN_S = 1800.0
POLL_S = 0.05
END_WITHIN_S = 5.0
"""Seconds for engines to end their weight-update sessions after a sync that has failed."""
CONTINUE_WITHIN_S = 10.0
"""Seconds for engines to take up generation again after a sync that has failed."""
logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class SyncReport:
    """The cost of one sync: wall seconds, of which `parts` by name, and bytes sent to each engine.

    `waited`: seconds before it, until nothing was in flight.
    """

    seconds: float
    bytes: int
    parts: Mapping[str, float] = field(default_factory=dict[str, float])
    waited: float = 0.0

    def metrics(self) -> dict[str, float]:
        result = {
            "sync/seconds": self.seconds,
            "sync/gb": self.bytes / 1e9,
            "sync/gb_per_s": self.bytes / self.seconds / 1e9,
            "sync/waited_seconds": self.waited,
        }
        for name, seconds in self.parts.items():
            result |= {f"sync/{name}_seconds": seconds, f"sync/{name}_gb_per_s": self.bytes / seconds / 1e9}
        return result


class Transport(ABC):
    """The sending side. `client` is closed with it."""

    engines_generate: ClassVar[bool] = False
    """Whether the engines can generate right after `send`: colocated ones may have no memory for it yet."""

    def __init__(
        self,
        client: EngineClient,
        *,
        bucket_bytes: int,
        pause: PauseChoice = "drain",
        drain_within: float = DRAIN_WITHIN_S,
    ) -> None:
        """`pause`: what becomes of requests in flight; those that are waited for make progress at least every
        `drain_within` seconds."""
        self._client = client
        self._bucket_bytes = bucket_bytes
        self._pause_choice: PauseChoice = pause
        self._drain_within = drain_within
        self._runner = asyncio.Runner()

    @abstractmethod
    def send(self, tensors: Iterable[NamedTensor], *, version: int) -> SyncReport:
        """Send all `tensors`, to their end; the engines then report `version`.

        Raises:
            RuntimeError: an engine refused them, or did not answer; it names the engine.
        """

    @contextmanager
    def paused(self) -> Iterator[float]:
        """Weights may be changed inside: no engine generates. Gives the seconds that it took to come to that.

        drain: requests in flight are answered first. abort: they are answered at once, with what they have. in_place:
        they wait and go on over the KV cache that they have. retract: they wait, and their prompts and responses are
        prefilled again. With the first two no answer is of two versions; an answer of the others names the later one.

        Raises:
            RuntimeError: something was in flight, and for `drain_within` seconds no engine made progress.
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
        """`paused`, with one weight-update session at every engine that has sessions; buckets may be sent inside.

        It is closed in every case. An engine that cannot close it makes the sync fail.
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
        if choice in ("in_place", "retract"):  # cannot be flushed, and need not be: requests share no cache then
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
        """Nothing is in flight, no engine begins anything, and no cache of earlier weights is left.

        Only an idle engine flushes its cache, so that tells. A request may slip in before the pause; then all go on.
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
        """For engines after a failure, which may be gone: what they do not do is logged."""
        try:
            await asyncio.wait_for(asking, seconds)
        except (EngineError, TimeoutError) as error:
            logger.warning("after the weight sync has failed: %r", error)

    def checksums(self) -> dict[str, str]:
        """Each engine's own checksum of its weights, by URL."""
        return self._runner.run(self._by_url(self._client.weights_checksum))

    def versions(self) -> dict[str, str]:
        """The policy version that each engine reports, by URL."""
        return self._runner.run(self._by_url(self._client.weight_versions))

    def prompt_log_probs(self, tokens: list[int]) -> dict[str, list[float]]:
        """Each engine's log-probs of the prompt `tokens` but the first, by URL."""
        return self._runner.run(self._by_url(lambda: self._client.prompt_log_probs(tokens)))

    async def _by_url(self, ask: Callable[[], Awaitable[list[T]]]) -> dict[str, T]:
        return dict(zip(await self._client.workers(), await ask(), strict=True))

    def load_from_disk(self, path: str, *, version: int) -> None:
        """Let every engine forget its weights and load the HF directory `path`."""

        async def reload() -> None:
            await self._client.reset_weights()
            await self._client.update_weights_from_disk(path, weight_version=str(version))

        with self.paused():
            self._runner.run(reload())

    def leave(self) -> None:
        """Close, where engines may be gone: nothing is asked of them."""
        Transport.close(self)

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()
