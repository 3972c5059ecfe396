"""A checkpoint is that of one moment, although training goes on while it is written."""

from __future__ import annotations

import logging
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import STATE, Run, make_args, same_bits
from worker_pool import WorkerPool, joined

from slime.config.args import Args
from slime.megatron.checkpoint.files import find_checkpoint
from slime.megatron.checkpoint.staging import ALIGNED, Staging

pytestmark = pytest.mark.dist


def saved_beside_steps(rank: int, world_size: int, init_method: str, args: Args, copied: bool) -> Any:
    """Begin a save after two steps, take two more while it is written; return weights and draws at the save."""
    from slime.megatron.checkpoint.background import Saver

    with joined(args, rank, world_size, init_method) as topology:
        random.seed(rank)
        run, saver = Run(args, topology), Saver()
        run.initialize()
        for number in range(2):
            run.step(number)
        at_save, snapshot = run.weights(), run.snapshot(2)
        if copied:
            saver.begin(lambda staging: run.snapshot(2, staging=staging))
        draws = run.draws()
        for number in range(2, 4):
            run.step(number)
        if copied:
            assert saver.finish().path.name == "iter_0000002" and not saver.is_busy
        else:
            snapshot.write()
        return at_save, draws, run.weights()


def loaded(rank: int, world_size: int, init_method: str, args: Args, path: Path) -> Any:
    """Return what `saved_beside_steps` returns, beginning from its checkpoint."""
    with joined(args, rank, world_size, init_method) as topology:
        run = Run(args, topology)
        assert run.load(path).state == STATE | {"failed": pytest.approx(float("nan"), nan_ok=True)}
        at_load, draws = run.weights(), run.draws()
        for number in range(2, 4):
            run.step(number)
        return at_load, draws, run.weights()


@pytest.mark.parametrize("sharded", [True, False], ids=["distributed optimizer", "replicas"])
def test_steps_during_a_save_do_not_change_it(workers: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    """Weights, optimizer, schedule and random numbers are those of the moment in which the save began."""
    args = make_args(tmp_path / "copied", bf16=True, use_distributed_optimizer=sharded)
    before = workers.run(2, saved_beside_steps, args, True)
    after = workers.run(2, loaded, args, tmp_path / "copied")
    for (at_save, draws, end), (at_load, draws_again, end_again) in zip(before, after, strict=True):
        assert same_bits(at_load, at_save) and not same_bits(at_save, end)
        assert draws_again == draws
        assert same_bits(end_again, end)
    # Control: without copies the later weights are written.
    args = make_args(tmp_path / "views", bf16=True, use_distributed_optimizer=sharded)
    (at_save, _, end), _ = workers.run(2, saved_beside_steps, args, False)
    (at_load, _, _), _ = workers.run(2, loaded, args, tmp_path / "views")
    assert same_bits(at_load, end) and not same_bits(at_load, at_save)


def failed_saves(rank: int, world_size: int, init_method: str, args: Args) -> list[str]:
    """Return the errors of a save whose directory is gone, and of one whose state on rank 0 is not JSON."""
    from slime.megatron.checkpoint.background import Saver

    with joined(args, rank, world_size, init_method) as topology:
        run, saver = Run(args, topology), Saver()
        run.initialize()
        saver.begin(lambda staging: run.snapshot(0, staging=staging))
        saver.finish()

        def snapshot(state: dict[str, Any], staging: Staging) -> Any:
            taken = run.snapshot(1, state, staging=staging)
            torch.distributed.barrier()
            if rank == 1 and not state:
                taken.directory.rename(taken.directory.with_name(".tmp_elsewhere"))
            torch.distributed.barrier()
            return taken

        errors: list[str] = []
        for state in ({}, {"cursor": object()}):
            saver.begin(partial(snapshot, state))
            try:
                saver.finish()
                errors.append("")
            except RuntimeError as error:
                errors.append(str(error))
            assert not saver.is_busy
        return errors


def test_an_error_in_the_background_reaches_every_rank(workers: WorkerPool, tmp_path: Path) -> None:
    for gone, no_json in workers.run(2, failed_saves, make_args(tmp_path)):
        assert f"saving to {tmp_path} failed" in gone or str(tmp_path) in gone
        assert "No such file" in gone and "MiB are free there" in gone
        assert "Object of type object is not JSON serializable" in no_json
    found = find_checkpoint(tmp_path)
    assert found is not None and found.rollout_id == 0
    assert not list(tmp_path.glob("iter_0000001")) and not (tmp_path / ".tmp_iter_0000001").exists()


def test_copies_share_nothing_and_memory_is_reused() -> None:
    tensors = [torch.arange(5.0), torch.ones(3, 4, dtype=torch.bfloat16), torch.tensor(7), torch.empty(0, 2)]
    before = [tensor.clone() for tensor in tensors]
    staging = Staging()
    copies = staging.copies(tensors)
    assert copies is not None
    for tensor, copy, then in zip(tensors, copies, before, strict=True):
        tensor.zero_()
        assert torch.equal(copy, then) and copy.dtype == then.dtype and copy.shape == then.shape
        assert copy.untyped_storage().nbytes() == copy.nbytes, "torch.save writes whole storages"
    places = [copy.data_ptr() for copy in copies if copy.numel()]
    assert all((place - places[0]) % ALIGNED == 0 for place in places) and len(set(places)) == len(places)
    again = staging.copies(tensors[:2])
    assert again is not None and [copy.data_ptr() for copy in again] == places[:2]


def test_too_little_memory_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A tensor without memory of its own stands for one that is larger than the machine."""
    huge = torch.empty(1).expand(2**50)
    with caplog.at_level(logging.WARNING):
        assert Staging().copies([huge]) is None
    assert "training waits until it is written" in caplog.text
