"""Each rank writes and reads its own share of a checkpoint."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_up import Run, make_args
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from worker_pool import WorkerPool, joined

from slime.config.args import Args
from slime.megatron.checkpoint.files import find_checkpoint
from slime.megatron.optim.flat_shares import _shares, boxes

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


@pytest.mark.parametrize("begin", [0, 12], ids=["a weight", "the second half of a weight"])
def test_shares_hold_the_entries_at_their_places(begin: int) -> None:
    """The ranks of two shares of every possible border have each entry once, where the whole tensor has it."""
    whole = ShardedTensor.from_rank_offsets("w", torch.empty(3, 4), (1, 1, 2), replica_id=(0, 0, 1))
    flat = torch.arange(24.0)
    optimizer: Any = SimpleNamespace(distributed_optimizer_instance_id=0)
    expected = torch.zeros(3, 8)
    expected[:, 4:] = flat[begin : begin + 12].view(3, 4)  # the other tensor-parallel rank has the first columns
    for border in range(25):
        found = torch.zeros(3, 8)
        for start, end in ((0, border), (border, 24)):
            place, state = SimpleNamespace(start=start, end=end), flat[start:end]
            for share in _shares(whole, "key", state, begin, place, optimizer):
                assert share.data is not None and share.replica_id == (0, 0, 0) and share.global_shape == (3, 8)
                found[share.global_slice()] += share.data
        assert torch.equal(found, expected)


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


def bytes_read(rank: int, world_size: int, init_method: str, args: Args, path: Path, shared: bool) -> int:
    """Return the bytes of the pieces that this rank's reader is asked for while it loads everything."""
    from slime.megatron.checkpoint import torch_dist
    from slime.megatron.checkpoint.save_load import load_checkpoint

    read = 0

    class Counted(torch_dist._Reader):
        def read_data(self, plan: Any, planner: Any) -> Any:
            nonlocal read
            read += sum(self.storage_data[item.storage_index].length for item in plan.items)
            return super().read_data(plan, planner)

    with joined(args, rank, world_size, init_method) as topology, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_dist, "_Reader", Counted)
        if not shared:  # the control: every rank reads whatever it wants
            patch.setattr(torch_dist, "FullyParallelLoadStrategyWrapper", lambda strategy, group: strategy)
        run = Run(args, topology)
        found = find_checkpoint(path)
        assert found is not None
        load_checkpoint(found, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)
        return read


@pytest.mark.parametrize("sharded", [True, False], ids=["distributed optimizer", "replicas"])
def test_two_replicas_read_each_byte_once(workers: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    """A piece of a weight at the border of two ranks' shares is read by both."""
    changes: dict[str, Any] = {"use_distributed_optimizer": sharded, "bf16": True}
    args = make_args(tmp_path, **changes)
    workers.run(2, saved_by, args)
    size = sum(file.stat().st_size for file in (tmp_path / "iter_0000000").glob("*.distcp"))
    once = sum(workers.run(2, bytes_read, args, tmp_path, True))
    assert 0.8 * size < once < 1.05 * size, "Megatron's objects and random states are not read"
    control = sum(workers.run(2, bytes_read, args, tmp_path, False))
    assert control > (1.1 if sharded else 1.9) * once, "weights alone, or the optimizer as well, would be read twice"
