"""The HTTP endpoints that receive and check weights.

- Where it sits: `server` mounts these. Tensors are received in a thread of their own, and written through
  `EngineWeights` between two steps of the scheduler.
- Invariant: a broadcast is received whole before it is checked, so an error here neither leaves the sender waiting nor
  half a bucket written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import torch
from aiohttp import web

from slime.engine.bucket_layout import BucketLayout
from slime.engine.embedded.answers import in_daemon_thread, json_answer, read_body, read_no_fields
from slime.engine.embedded.scheduler import Scheduler
from slime.engine.embedded.weights import EngineWeights
from slime.engine.protocol import (
    DestroyWeightsUpdateGroup,
    Endpoint,
    InitWeightsUpdateGroup,
    UpdateWeightsFromDisk,
    UpdateWeightsFromDistributed,
    WeightsChecker,
)
from slime.engine.weight_group import WeightGroup, join_weight_group


class WeightHandlers:
    """Handlers for weights; `call` runs a function in the scheduler's thread, between two steps."""

    def __init__(
        self,
        scheduler: Scheduler,
        weights: EngineWeights,
        call: Callable[[Callable[[], Any]], Awaitable[Any]],
        *,
        dist_timeout: float,
    ) -> None:
        self._scheduler = scheduler
        self._weights = weights
        self._call = call
        self._dist_timeout = dist_timeout
        self._groups: dict[str, WeightGroup] = {}
        self._updating = asyncio.Lock()
        """Held while a bucket is received and written, so that a session begins and ends between buckets."""

    def mount(self, app: web.Application) -> None:
        if self._weights.sessions:
            app.router.add_post(Endpoint.BEGIN_WEIGHT_UPDATE, self.begin_update)
            app.router.add_post(Endpoint.END_WEIGHT_UPDATE, self.end_update)
        app.router.add_post(Endpoint.INIT_WEIGHTS_UPDATE_GROUP, self.init_group)
        app.router.add_post(Endpoint.DESTROY_WEIGHTS_UPDATE_GROUP, self.destroy_group)
        app.router.add_post(Endpoint.UPDATE_WEIGHTS_FROM_DISTRIBUTED, self.update_from_group)
        app.router.add_post(Endpoint.UPDATE_WEIGHTS_FROM_DISK, self.update_from_disk)
        app.router.add_post(Endpoint.WEIGHTS_CHECKER, self.check_weights)

    async def init_group(self, http: web.Request) -> web.Response:
        asked = InitWeightsUpdateGroup.from_json(await read_body(http))
        if asked.group_name in self._groups:
            raise ValueError(f"weight group {asked.group_name!r} exists already; destroy it first")
        if asked.backend != "gloo":
            raise ValueError(f"backend is {asked.backend!r}; this engine runs on a CPU: use gloo")

        def join() -> WeightGroup:
            return join_weight_group(
                asked.master_address,
                asked.master_port,
                asked.rank_offset,
                asked.world_size,
                asked.group_name,
                asked.backend,
                False,
                timeout=self._dist_timeout,
            )

        self._groups[asked.group_name] = await in_daemon_thread(join)
        return json_answer({"success": True, "message": f"joined {asked.group_name!r} as rank {asked.rank_offset}"})

    async def destroy_group(self, http: web.Request) -> web.Response:
        name = DestroyWeightsUpdateGroup.from_json(await read_body(http)).group_name
        group = self._groups.pop(name, None)
        if group is None:
            raise ValueError(f"there is no weight group {name!r}")
        await in_daemon_thread(group.close)  # returns only when a pending broadcast has ended
        return json_answer({"success": True, "message": f"left {name!r}"})

    async def begin_update(self, http: web.Request) -> web.Response:
        await read_no_fields(http)
        async with self._updating:
            await self._call(self._weights.begin)
        return json_answer({"success": True, "message": "Success"})

    async def end_update(self, http: web.Request) -> web.Response:
        await read_no_fields(http)
        async with self._updating:
            await self._call(self._weights.end)
        return json_answer({"success": True, "message": "Success"})

    async def update_from_group(self, http: web.Request) -> web.Response:
        asked = UpdateWeightsFromDistributed.from_json(await read_body(http))
        async with self._updating:
            return await self._update_from_group(asked)

    async def _update_from_group(self, asked: UpdateWeightsFromDistributed) -> web.Response:
        # As in SGLang, the bucket is then not received: the sender's broadcast waits until its group is closed.
        self._weights.require_session(Endpoint.UPDATE_WEIGHTS_FROM_DISTRIBUTED)
        group = self._groups.get(asked.group_name)
        if group is None:
            raise ValueError(
                f"there is no weight group {asked.group_name!r}; POST {Endpoint.INIT_WEIGHTS_UPDATE_GROUP}"
            )
        # Receive before anything is checked: the sender is sending, and every member has to take part.
        tensors = await in_daemon_thread(lambda: _receive(group, asked))

        def write() -> str:
            if asked.abort_all_requests:
                self._scheduler.abort(lambda _: True)
            return self._weights.write_bucket(
                asked.names, tensors, version=asked.weight_version, flush=asked.flush_cache
            )

        return json_answer({"success": True, "message": await self._call(write)})

    async def update_from_disk(self, http: web.Request) -> web.Response:
        asked = UpdateWeightsFromDisk.from_json(await read_body(http))

        def load() -> None:
            if asked.abort_all_requests:
                self._scheduler.abort(lambda _: True)
            self._weights.load(asked.model_path, version=asked.weight_version, flush=asked.flush_cache)

        await self._call(load)
        return json_answer({"success": True, "message": f"loaded {asked.model_path}", "num_paused_requests": 0})

    async def check_weights(self, http: web.Request) -> web.Response:
        action = WeightsChecker.from_json(await read_body(http)).action
        if action == "reset_tensors":
            await self._call(self._weights.reset)
            return json_answer({"success": True, "message": "all tensors hold garbage now"})
        digest = await self._call(self._weights.checksum)
        return json_answer({"success": True, "message": "checksum", "per_engine_checksum": digest})


def _receive(group: WeightGroup, asked: UpdateWeightsFromDistributed) -> list[torch.Tensor]:
    layout = BucketLayout.parse(asked.names, asked.dtypes, asked.shapes)
    if asked.load_format == "flattened_bucket":
        flat = torch.empty(layout.num_bytes, dtype=torch.uint8)
        group.broadcast(flat)
        return layout.split(flat)
    tensors = [torch.empty(place.shape, dtype=place.dtype) for place in layout.places]
    for tensor in tensors:
        group.broadcast(tensor)
    return tensors
