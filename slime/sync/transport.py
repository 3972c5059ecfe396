"""What every weight transport does: it sends whole sets of weights, and asks the engines what they hold.

Path: trainer rank 0 holds one for the whole run; `broadcast` and `disk` are the ways to send. Invariant: when `send`
returns, every engine has said that it holds the whole set under its version; nothing else counts as sent.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from slime.engine.client import EngineClient
from slime.sync.stream import NamedTensor


@dataclass(frozen=True)
class SyncReport:
    """What one sync cost: wall seconds, of which `parts` by name, and bytes sent to each engine."""

    seconds: float
    bytes: int
    parts: Mapping[str, float] = field(default_factory=dict[str, float])

    def metrics(self) -> dict[str, float]:
        result = {
            "sync/seconds": self.seconds,
            "sync/gb": self.bytes / 1e9,
            "sync/gb_per_s": self.bytes / self.seconds / 1e9,
        }
        for name, seconds in self.parts.items():
            result |= {f"sync/{name}_seconds": seconds, f"sync/{name}_gb_per_s": self.bytes / seconds / 1e9}
        return result


class Transport(ABC):
    """The sending side. `client` is closed with it."""

    def __init__(self, client: EngineClient, *, bucket_bytes: int) -> None:
        self._client = client
        self._bucket_bytes = bucket_bytes
        self._runner = asyncio.Runner()

    @abstractmethod
    def send(self, tensors: Iterable[NamedTensor], *, version: int) -> SyncReport:
        """Send all `tensors`, to their end; the engines then report `version`.

        Raises:
            RuntimeError: an engine refused them, or did not answer; it names the engine.
        """

    def checksums(self) -> dict[str, str]:
        """Each engine's own checksum of its weights, by URL."""
        return self._runner.run(self._by_url(self._client.weights_checksum))

    def versions(self) -> dict[str, str]:
        """The policy version that each engine reports, by URL."""
        return self._runner.run(self._by_url(self._client.weight_versions))

    async def _by_url(self, ask: Callable[[], Awaitable[list[str]]]) -> dict[str, str]:
        return dict(zip(await self._client.workers(), await ask(), strict=True))

    def load_from_disk(self, path: str, *, version: int) -> None:
        """Let every engine forget its weights and load the HF directory `path`."""

        async def reload() -> None:
            await self._client.reset_weights()
            await self._client.update_weights_from_disk(path, weight_version=str(version))

        self._runner.run(reload())

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()
