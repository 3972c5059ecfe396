"""Each rank writes and reads its own share of a checkpoint."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import Run, make_args
from worker_pool import WorkerPool, joined

from slime.config.args import Args
from slime.megatron.optim.flat_shares import boxes

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4), (1, 5), (4, 1, 3)], ids=str)
def test_boxes_hold_exactly_the_flat_entries(shape: tuple[int, ...]) -> None:
    """A matrix's range is at most three boxes: the rest of a row, whole rows, the beginning of a row."""
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    flat = tensor.flatten()
    for start, stop in itertools.combinations_with_replacement(range(len(flat) + 1), 2):
        found = list(boxes(shape, start, stop))
        parts = [
            tensor[tuple(slice(at, at + size) for at, size in zip(*box, strict=True))].reshape(-1) for box in found
        ]
        assert torch.equal(torch.cat([flat[:0], *parts]), flat[start:stop])
        assert len(found) <= max(1, 2 * len(shape) - 1)


def saved_by(rank: int, world_size: int, init_method: str, args: Args) -> None:
    with joined(args, rank, world_size, init_method) as topology:
        run = Run(args, topology)
        run.initialize()
        run.step(0)
        run.save(0)


@pytest.mark.parametrize("sharded", [True, False], ids=["distributed optimizer", "replicas"])
def test_every_rank_writes_its_share(workers: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    """No rank writes much more of the weights and the optimizer than the other."""
    changes: dict[str, Any] = {"use_distributed_optimizer": sharded, "bf16": True}
    workers.run(2, saved_by, make_args(tmp_path, **changes))
    first, second = (file.stat().st_size for file in sorted((tmp_path / "iter_0000000").glob("*.distcp")))
    assert 0.8 < first / second < 1.25
