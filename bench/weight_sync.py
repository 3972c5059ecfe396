"""What announcing buckets of weights to 100 engines costs, compared with announcing each one from scratch.

    python -m bench.weight_sync       (make bench-sync)

The weights have the names and the number of tensors of Qwen3-30B-A3B, with every size divided by 16, so that all fit
here; buckets are smaller in the same ratio. The engines are servers of one other process: each answers a bucket after
a given time, as SGLang does when its GPU has the work to do. The group has no member but the sender, so no weights
travel: this measures messages, their bytes, and the sender's own time. Invariant: every engine was sent each tensor
once, in order.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import orjson
import torch
from aiohttp import web

from bench.common import OUTPUTS, Goal, Spread, Table, in_turns, machine, ratios, write_result
from slime.engine.bucket_layout import NamedTensor
from slime.engine.client import EngineClient
from slime.engine.protocol import WEIGHT_GROUP, Endpoint, UpdateWeightsFromDistributed
from slime.engine.server_process import find_free_port
from slime.engine.weight_group import WeightGroup, join_weight_group
from slime.sync.buckets import Buckets, FlatBuckets
from slime.sync.in_flight import Announcements, InFlight

SMALLER = 16
MIB = 1024**2
BEFORE, NOW = "each bucket from scratch, 512 MiB", "announced once a connection, 2 GiB"
LOOPBACK = "127.0.0.1"


def weights() -> list[NamedTensor]:
    """Return tensors with the names of Qwen3-30B-A3B: 48 layers of 128 experts, 2,048 wide."""

    def tensor(name: str, *shape: int) -> NamedTensor:
        return name, torch.zeros([max(1, size // SMALLER) for size in shape], dtype=torch.bfloat16)

    found = [tensor("model.embed_tokens.weight", 151936, 2048)]
    for layer in range(48):
        at = f"model.layers.{layer}"
        found += [tensor(f"{at}.{name}_layernorm.weight", 2048) for name in ("input", "post_attention")]
        found += [tensor(f"{at}.self_attn.{name}_proj.weight", 512, 2048) for name in "kv"]
        found += [tensor(f"{at}.self_attn.q_proj.weight", 4096, 2048), tensor(f"{at}.mlp.gate.weight", 128, 2048)]
        found += [tensor(f"{at}.self_attn.o_proj.weight", 2048, 4096)]
        found += [tensor(f"{at}.self_attn.{name}_norm.weight", 128) for name in "qk"]
        for expert in range(128):
            within = f"{at}.mlp.experts.{expert}"
            found += [tensor(f"{within}.{name}_proj.weight", 768, 2048) for name in ("gate", "up")]
            found += [tensor(f"{within}.down_proj.weight", 2048, 768)]
    return [*found, tensor("model.norm.weight", 2048), tensor("lm_head.weight", 151936, 2048)]


# ---- the engines


class Received:
    """What one server was sent since it was last asked."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.names: list[str] = []
        self.bytes = self.messages = 0

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.bytes += len(body)
        self.messages += 1
        self.names += orjson.loads(body)["names"]
        await asyncio.sleep(self._seconds)
        return web.json_response({"success": True})


def serve(count: int, seconds: float, pipe: Connection) -> None:
    """Serve `count` engines; write their URLs to `pipe`, and after each word from there what they were sent."""

    async def run() -> None:
        engines = [Received(seconds) for _ in range(count)]
        urls: list[str] = []
        for engine in engines:
            app = web.Application(client_max_size=2**30)
            app.router.add_post(Endpoint.UPDATE_WEIGHTS_FROM_DISTRIBUTED, engine.take)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            site = web.TCPSite(runner, LOOPBACK, find_free_port())
            await site.start()
            urls.append(site.name)
        pipe.send(urls)
        while await asyncio.to_thread(pipe.recv):
            names = engines[0].names
            assert all(engine.names == names for engine in engines)
            pipe.send((names, sum(e.bytes for e in engines), sum(e.messages for e in engines)))
            for engine in engines:
                engine.names, engine.bytes, engine.messages = [], 0, 0

    asyncio.run(run())


# ---- the sender


def from_scratch(client: EngineClient, group: WeightGroup, runner: asyncio.Runner, tensors: list[NamedTensor]) -> None:
    """Send as earlier versions did: one bucket at a time, whose message is built and encoded again for each engine."""
    num_engines = len(runner.run(client.workers()))
    for bucket in Buckets(tensors, 512 * MIB // SMALLER**2):
        flat, layout = bucket.layout.flatten(bucket.tensors), bucket.layout
        message = UpdateWeightsFromDistributed(
            names=layout.names,
            dtypes=layout.dtypes,
            shapes=layout.shapes,
            group_name=WEIGHT_GROUP,
            flush_cache=False,
            load_format="flattened_bucket",
        )
        messages = [message] * num_engines
        runner.run(client._everywhere(Endpoint.UPDATE_WEIGHTS_FROM_DISTRIBUTED, messages, collective=True))
        group.broadcast(flat)


class Sender:
    """Sends syncs over one connection, as a `BroadcastTransport` does."""

    def __init__(self, client: EngineClient, group: WeightGroup, runner: asyncio.Runner) -> None:
        self._client, self._group, self._runner = client, group, runner
        self._buckets = FlatBuckets(2048 * MIB // SMALLER**2)
        self._announcements = Announcements(WEIGHT_GROUP)

    def send(self, tensors: Sequence[NamedTensor]) -> None:
        with InFlight(self._client, self._runner, self._group) as under_way:
            for bucket in self._buckets.fill(tensors, wait_until_free=under_way.wait_until_free):
                under_way.send(bucket, self._announcements.of(bucket, "1"))
            under_way.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=100)
    parser.add_argument("--engine-ms", type=float, default=5.0, help="milliseconds until an engine answers a bucket")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    facts = machine()
    tensors = weights()
    names = [name for name, _ in tensors]
    ours, theirs = multiprocessing.Pipe()
    engines = multiprocessing.get_context("spawn").Process(
        target=serve, args=(given.engines, given.engine_ms / 1e3, theirs), daemon=True
    )
    engines.start()
    client = EngineClient("", engines=ours.recv())
    group = join_weight_group(LOOPBACK, find_free_port(), 0, 1, WEIGHT_GROUP, "gloo", True)
    counts: dict[str, tuple[int, int]] = {}
    cpu: dict[str, list[float]] = {BEFORE: [], NOW: []}
    with asyncio.Runner() as runner:
        sender = Sender(client, group, runner)

        def timed(name: str) -> float:
            start, busy = time.perf_counter(), time.process_time()
            if name == BEFORE:
                from_scratch(client, group, runner, tensors)
            else:
                sender.send(tensors)
            seconds = time.perf_counter() - start
            cpu[name].append(time.process_time() - busy)
            ours.send(True)
            received, num_bytes, messages = ours.recv()
            assert received == names, "each tensor once, in order"
            counts[name] = (num_bytes, messages)
            return seconds

        seconds = in_turns({BEFORE: lambda: timed(BEFORE), NOW: lambda: timed(NOW)}, rounds=given.rounds)
        runner.run(client.close())
    ours.send(False)
    engines.join()
    columns = ["a sync to all engines", "messages", "MB", "seconds", "sender's CPU seconds"]
    table = Table(f"Announcing the buckets of {len(names):,} tensors to {given.engines} engines", columns)
    for name in (BEFORE, NOW):
        num_bytes, messages = counts[name]
        busy = Spread.of(cpu[name][1:])
        table.rows.append(
            [name, f"{messages:,}", f"{num_bytes / 1e6:.1f}", Spread.of(seconds[name]).show(2), busy.show(2)]
        )
    goal = Goal("the sender's time, from scratch / announced once", ratios(seconds[BEFORE], seconds[NOW]).median, 2)
    raw = {"seconds": seconds, "cpu": cpu, "counts": counts}
    facts |= {"an engine answers after": f"{given.engine_ms:g} ms"}
    write_result(OUTPUTS / "sync.json", [table], [goal], facts, raw)


if __name__ == "__main__":
    main()
