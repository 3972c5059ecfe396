"""EngineMemory: gives the engine's memory back while trainers use the machine, and takes it again.

- Called by: `device_handlers`, through `Scheduler.call`, between two steps.
- Invariant: memory that was given back is really free. No token is sampled until all of it is there again and whole
  weights have arrived.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from slime.engine.device_protocol import MemoryTag
from slime.engine.embedded.scheduler import Scheduler
from slime.engine.embedded.weights import EngineWeights

HOLD = "memory given back"


class EngineMemory:
    """Weights and KV cache by tag; this engine has no CUDA graphs, so their tag frees nothing."""

    def __init__(self, scheduler: Scheduler, weights: EngineWeights) -> None:
        self._scheduler = scheduler
        self._weights = weights
        self.released: set[MemoryTag] = set()

    def release(self, tags: Sequence[MemoryTag]) -> None:
        """Free the memory of `tags`.

        Raises:
            ValueError: requests are running or waiting, or the memory was given back before.
        """
        unfinished = self._scheduler.num_running + self._scheduler.num_waiting
        if unfinished:
            raise ValueError(f"{unfinished} requests are not finished; abort them before memory is given back")
        twice = sorted(self.released.intersection(tags))
        if twice:
            raise ValueError(f"the memory of {', '.join(twice)} has been given back already")
        self._scheduler.holds.add(HOLD)
        self.released.update(tags)
        if "kv_cache" in tags:
            self._scheduler.forget_prompts()
            self._scheduler.cache.clear()
        if "weights" in tags:
            self._weights.release()
        _trim_heap()

    def resume(self, tags: Sequence[MemoryTag]) -> None:
        """Take the memory of `tags` again; the weights then hold garbage until they are sent.

        Raises:
            ValueError: the memory was not given back.
        """
        there = sorted(set(tags) - self.released)
        if there:
            raise ValueError(f"the memory of {', '.join(there)} was not given back")
        if "weights" in tags:
            self._weights.take_memory()
        self.released.difference_update(tags)
        if not self.released:
            self._scheduler.holds.discard(HOLD)

    def refuse_requests(self) -> None:
        """Raise ValueError while nothing can be generated; the error names what is missing."""
        if self.released:
            raise ValueError(
                f"this engine has given back the memory of {', '.join(sorted(self.released))}; it generates once it "
                "has it again (/resume_memory_occupation) and its weights have been sent"
            )
        if self._weights.lost:
            raise ValueError(
                "this engine has its memory again, but its weights have not been sent since; send a whole set, or load "
                "one from disk"
            )


def _trim_heap() -> None:
    """Give freed memory inside the C heap back to the operating system, where the C library can (glibc).

    A large tensor usually has pages of its own, which go back as soon as it is freed. But if the heap has a gap that is
    large enough, malloc places the tensor there, and `free` then only keeps the gap for later.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
