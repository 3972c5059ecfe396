"""The HTTP endpoints for trainers on the engine's own machine: memory occupation, and weights through shared memory.

- Where it sits: `server` mounts these; their work runs in the scheduler's thread, between two steps.
- Invariant: only an anonymous memory file of this user, made for weights, is ever opened, and nothing is unpickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable
from typing import Any

import torch
from aiohttp import web

from slime.engine.bucket_layout import BucketLayout
from slime.engine.device_protocol import MEMORY_FILE, MemoryOccupation, SharedBucket, UpdateWeightsFromTensor
from slime.engine.embedded.answers import json_answer, read_body
from slime.engine.embedded.memory import EngineMemory
from slime.engine.embedded.scheduler import Scheduler
from slime.engine.embedded.weights import EngineWeights
from slime.engine.protocol import Endpoint

_PATH = re.compile(r"/proc/[1-9][0-9]*/fd/[0-9]+")


class DeviceHandlers:
    """Handlers for memory and shared weights; `call` runs a function in the scheduler's thread, between two steps."""

    def __init__(
        self,
        scheduler: Scheduler,
        weights: EngineWeights,
        memory: EngineMemory,
        call: Callable[[Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        self._scheduler = scheduler
        self._weights = weights
        self._memory = memory
        self._call = call

    def mount(self, app: web.Application) -> None:
        app.router.add_post(Endpoint.UPDATE_WEIGHTS_FROM_TENSOR, self.update_from_tensor)
        app.router.add_post(Endpoint.RELEASE_MEMORY_OCCUPATION, self.release)
        app.router.add_post(Endpoint.RESUME_MEMORY_OCCUPATION, self.resume)

    async def update_from_tensor(self, http: web.Request) -> web.Response:
        asked = UpdateWeightsFromTensor.from_json(await read_body(http))
        bucket = asked.shared_memory
        if bucket is None:
            raise ValueError("serialized_named_tensors are pickled; this engine takes weights through shared_memory")
        self._weights.require_session(Endpoint.UPDATE_WEIGHTS_FROM_TENSOR)

        def write() -> str:
            if asked.abort_all_requests:
                self._scheduler.abort(lambda _: True)
            return self._weights.write_bucket(
                bucket.names, read_shared(bucket), version=asked.weight_version, flush=asked.flush_cache
            )

        return json_answer({"success": True, "message": await self._call(write)})

    async def release(self, http: web.Request) -> web.Response:
        tags = MemoryOccupation.from_json(await read_body(http)).chosen
        await self._call(lambda: self._memory.release(tags))
        return json_answer({"success": True, "message": f"gave back {', '.join(tags)}"})

    async def resume(self, http: web.Request) -> web.Response:
        tags = MemoryOccupation.from_json(await read_body(http)).chosen
        await self._call(lambda: self._memory.resume(tags))
        return json_answer({"success": True, "message": f"took {', '.join(tags)}"})


def read_shared(bucket: SharedBucket) -> list[torch.Tensor]:
    """Return copies of the bucket's tensors.

    Raises:
        ValueError: the path is not a memory file for weights of this user, or it holds fewer bytes.
    """
    if not _PATH.fullmatch(bucket.path):
        raise ValueError(f"shared_memory.path is {bucket.path[:100]!r}; it has to be /proc/PROCESS/fd/NUMBER")
    try:
        file = os.open(bucket.path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise ValueError(f"shared_memory.path {bucket.path}: {error}; the sender runs on this machine") from error
    try:
        name = os.readlink(f"/proc/self/fd/{file}")
        status = os.fstat(file)
        if not name.startswith(f"/memfd:{MEMORY_FILE}") or status.st_uid != os.getuid():
            raise ValueError(f"shared_memory.path {bucket.path} is no memory file for weights of this user")
        layout = BucketLayout.parse(bucket.names, bucket.dtypes, bucket.shapes)
        size = layout.num_bytes
        if size > status.st_size:
            raise ValueError(f"shared_memory.path {bucket.path} holds {status.st_size} bytes, the bucket has {size}")
        flat = torch.from_file(f"/proc/self/fd/{file}", shared=False, size=size, dtype=torch.uint8)
        return layout.split(flat)
    finally:
        os.close(file)
