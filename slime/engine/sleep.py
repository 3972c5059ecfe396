"""Let all engines of a run give their devices' memory to trainers, in the right order.

- Called by: the rollout manager, around training.
- Invariant: an engine is idle and its cache is empty before it gives memory back (SGLang crashes otherwise).
"""

from __future__ import annotations

import asyncio
import time

from slime.engine.client import EngineClient, EngineError
from slime.engine.device_protocol import MemoryTag

FOR_WEIGHTS: tuple[MemoryTag, ...] = ("weights",)
"""The memory that an engine needs to receive weights."""
FOR_GENERATION: tuple[MemoryTag, ...] = ("kv_cache", "cuda_graph")
"""The memory that an engine needs in addition to generate."""
IDLE_WITHIN_S = 120.0
POLL_S = 0.02


async def put_to_sleep(client: EngineClient, *, abort: bool = True) -> None:
    """Abort what is in flight, and let the engines give back all memory. `abort`: False if nothing can be in flight.

    Raises:
        EngineError: an engine is not idle within two minutes, or refuses.
    """
    if abort:
        await client.abort_all()
    deadline = time.monotonic() + IDLE_WITHIN_S
    while True:
        try:
            await client.flush_cache()
            break
        except EngineError as error:  # only an idle engine flushes its cache
            if error.status != 400 or time.monotonic() > deadline:
                raise
        await asyncio.sleep(POLL_S)
    await client.release_memory([*FOR_WEIGHTS, *FOR_GENERATION])
