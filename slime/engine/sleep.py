"""Engines that give their devices' memory to trainers, and take it again: in this order, for all of a run at once.

Path: the rollout manager calls these around training. Invariant: an engine is idle and its cache empty before it gives
anything back (SGLang ends where it is not).
"""

from __future__ import annotations

import asyncio
import time

from slime.engine.client import EngineClient, EngineError
from slime.engine.device_protocol import MemoryTag

FOR_WEIGHTS: tuple[MemoryTag, ...] = ("weights",)
"""What has to be there to send weights."""
FOR_GENERATION: tuple[MemoryTag, ...] = ("kv_cache", "cuda_graph")
"""What has to be there besides to generate."""
IDLE_WITHIN_S = 120.0
POLL_S = 0.02


async def put_to_sleep(client: EngineClient, *, abort: bool = True) -> None:
    """End what is left in flight, and have the engines give back all memory. `abort`: False where nothing is.

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
