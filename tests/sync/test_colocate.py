"""The transport between trainers and engines on the same devices: placement and order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from worker_pool import WorkerPool

from slime.config.args import Args
from slime.engine.client import EngineClient
from slime.sync.buckets import Buckets
from slime.sync.colocate import ColocatedTransport, HostBuffer
from slime.sync.open import open_transport
from slime.sync.transport import Opening

URLS = ["http://127.0.0.1:1", "http://127.0.0.1:2"]


def gather(rank: int, world_size: int, init_method: str, ranks: Sequence[Sequence[int]]) -> tuple[list[Any], Any]:
    """Return what each trainer hands to its engine, with its rank as the handle, and the engine that it talks to."""
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    try:
        args = Args(rollout_engine="embedded", update_weight_buffer_size=64)
        opening = Opening(
            args=args,
            rank=rank,
            dtype=torch.float32,
            backend="gloo",
            router_url="",
            engine_urls=URLS[: len(ranks)],
            engine_ranks=[len(each) for each in ranks],
            shared_with=ranks,
        )
        transport = open_transport(opening)
        assert isinstance(transport, ColocatedTransport)
        own: EngineClient | None = transport._own
        handles = transport._gathered(rank) if transport._buffers else []
        transport.close()
        return handles, None if own is None else own._engines
    finally:
        dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([[0, 1], [2, 3]], [([0, 1], URLS[:1]), ([], None), ([2, 3], URLS[1:]), ([], None)]),
        ([[3, 1, 0, 2]], [([], None), ([], None), ([], None), ([3, 1, 0, 2], URLS[:1])]),
        ([[0], [1]], [([0], URLS[:1]), ([1], URLS[1:]), ([], None), ([], None)]),
    ],
)
def test_handles_follow_the_engines_rank_order(workers: WorkerPool, ranks: Any, expected: Any) -> None:
    assert workers.run(4, gather, ranks) == expected


def test_a_buffer_grows_and_packs_dtypes() -> None:
    buffer = HostBuffer()
    for dtypes in ([torch.float32], [torch.float32, torch.bfloat16, torch.float32], [torch.bfloat16]):
        tensors = [(str(i), torch.randn(3 + i, 2).to(dtype)) for i, dtype in enumerate(dtypes)]
        bucket = buffer.fill(next(Buckets(tensors, 2**30)))
        with open(bucket.path, "rb") as file:
            data = file.read()
        begin = 0
        for (_, tensor), dtype, shape in zip(tensors, bucket.dtypes, bucket.shapes, strict=True):
            there = torch.frombuffer(bytearray(data[begin : begin + tensor.nbytes]), dtype=getattr(torch, dtype))
            assert torch.equal(there.view(shape), tensor)
            begin += tensor.nbytes
    buffer.free()
