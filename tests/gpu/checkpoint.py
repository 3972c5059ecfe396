"""How long a checkpoint of Qwen3-4B with its optimizer stops training, and whether what is loaded is what was saved.

The limit is a plain copy of as many bytes from the GPU to pinned memory, measured in the same process. The first save
is left out of it, because it allocates the memory of the copies.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.gpu.checks import Report, check
from tests.gpu.trainer import forget, made_up_step
from tests.gpu.trainer_speed import args_of, batch_of, trainer_of

ENTRIES = 2**26
"""Numbers that are summed at a time."""
PIECE = 2**30
"""Bytes of one plain copy."""
LENGTHS = [2048] * 4


def state_of(trainer: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that a checkpoint has to bring back."""
    from slime.megatron.model.build import named_parameters
    from slime.megatron.optim.optimizer_state import parts_of

    for name, parameter in named_parameters(trainer.model):
        yield name, parameter.detach()
    for part, owner in enumerate(parts_of(trainer.optimizer)):
        weights = [weight for group in owner.optimizer.param_groups for weight in group["params"]]
        for number, weight in enumerate(weights):
            yield f"{part} main {number}", weight.detach()
            for slot, value in owner.optimizer.state[weight].items():
                yield f"{part} {slot} {number}", value.detach()


def sums(tensor: Tensor) -> tuple[int, int]:
    """Return two sums of a tensor's bits; the second one depends on their order."""
    bits = tensor.contiguous().view(-1).view(torch.int16)
    plain = ordered = 0
    for number, piece in enumerate(bits.split(ENTRIES)):
        values = piece.long()
        places = torch.arange(1, len(values) + 1, device=values.device) % 65_521
        plain += int(values.sum())
        ordered += (number + 1) * int((values * places).sum())
    return plain, ordered


def marks(trainer: Any) -> dict[str, tuple[int, int]]:
    return {name: sums(tensor) for name, tensor in state_of(trainer)}


def differing(ours: dict[str, tuple[int, int]], theirs: dict[str, tuple[int, int]]) -> int:
    assert ours.keys() == theirs.keys()
    return sum(ours[name] != theirs[name] for name in ours)


def plain_copy(size: int) -> float:
    """Return the seconds to copy `size` bytes from the GPU to pinned memory; the best of three."""
    here = torch.ones(PIECE, dtype=torch.uint8, device="cuda")
    there = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        start, left = time.perf_counter(), size
        while left > 0:
            length = min(left, PIECE)
            there[:length].copy_(here[:length], non_blocking=True)
            left -= length
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def begun(trainer: Any, rollout_id: int) -> float:
    """Begin a save, and return the seconds for which training stood still."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    trainer.begin_save(rollout_id, {"rollout": rollout_id})
    return time.perf_counter() - start


def step_seconds(trainer: Any, batch: Any, number: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    trainer.train(number, batch)
    torch.cuda.synchronize()
    return time.perf_counter() - start


@check(minutes=9)
def qwen3_4b(report: Report) -> None:
    """Check that a save of Qwen3-4B with its optimizer blocks training for little more than a plain copy."""
    from slime.megatron.checkpoint.files import find_checkpoint
    from slime.megatron.checkpoint.save_load import load_checkpoint

    forget()
    what = "Qwen3-4B with its optimizer"
    with tempfile.TemporaryDirectory() as folder:
        args = args_of("qwen3-4B", f"--max-tokens-per-gpu 8192 --lr 1e-5 --save {folder}")
        assert args.architecture is not None
        batch = batch_of(LENGTHS, args.architecture.vocab_size)
        with trainer_of(args) as trainer:
            for number in range(3):  # the first one compiles, and creates the optimizer's state
                step_seconds(trainer, batch, number)
            alone = min(step_seconds(trainer, batch, 3 + number) for number in range(3))
            size = sum(tensor.nbytes for _, tensor in state_of(trainer))
            first = begun(trainer, 0)
            written = trainer.saver.finish()
            report.row(f"{what}: the first save, which allocates", f"{first:.1f} s, {written.seconds:.0f} s in all")
            shutil.rmtree(written.path)  # the disk has no room for two
            saved = marks(trainer)
            copied = plain_copy(size)
            blocked = begun(trainer, 1)
            meanwhile: list[float] = []
            while trainer.saver.is_busy and len(meanwhile) < 20:
                meanwhile.append(step_seconds(trainer, batch, 10 + len(meanwhile)))
            written = trainer.saver.finish()
            value = f"{blocked:.2f} s for {size / 1e9:.1f} GB ({size / blocked / 1e9:.0f} GB/s)"
            limit = f"1.25 x {copied:.2f} s, a plain copy ({size / copied / 1e9:.0f} GB/s)"
            report.row(f"{what}: training stands still for", value, limit, blocked <= 1.25 * copied)
            assert trainer.saver.staging is not None
            pinned = trainer.saver.staging.is_pinned
            report.row(f"{what}: the copies are in pinned memory", pinned, True, pinned)
            report.row(f"{what}: the save until it is complete", f"{written.seconds:.1f} s")
            steps = f"{min(meanwhile) * 1e3:.0f} to {max(meanwhile) * 1e3:.0f} ms in {len(meanwhile)} steps"
            report.row(f"{what}: a step of 4 x 2048 tokens during the write", steps, f"{alone * 1e3:.0f} ms alone")
            later = marks(trainer)
            changed = differing(later, saved)
            report.row(f"{what}: control, tensors that the steps have changed", changed, "> 0", changed > 0)
            found = find_checkpoint(Path(folder))
            assert found is not None and found.rollout_id == 1
            start = time.perf_counter()
            load_checkpoint(found, model=trainer.model, optimizer=trainer.optimizer, scheduler=trainer.scheduler)
            report.row(f"{what}: checking and loading it", f"{time.perf_counter() - start:.1f} s")
            wrong = differing(marks(trainer), saved)
            report.row(f"{what}: loaded tensors that differ, of {len(saved)}", wrong, "0", wrong == 0)
            made_up_step(trainer, 0)  # it trains on
