"""Parts of the trainer on a GPU: --optimizer-cpu-offload compared with the same steps without it."""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from slime.config.args import Args
from tests.gpu.checks import Report, check
from tests.gpu.trainer_speed import args_of, batch_of, trainer_of

OFFLOAD = "--optimizer-cpu-offload"
STEPS = 3
COPIED = 12
"""Bytes of one bf16 parameter that go to the device and back in each step: its main weight and two moments."""


def made_up_step(trainer: Any, number: int) -> tuple[float, float]:
    """Take an optimizer step on random gradients that `number` decides; return the gradient norm and the seconds.

    The gradients of a backward pass would not do, because their last bits may differ from run to run.
    """
    from slime.megatron import device
    from slime.megatron.compat import cpu_layer
    from slime.megatron.model.build import named_parameters
    from slime.megatron.optim.optimizer import update

    on = device.device()
    trainer._stepper.forget_gradients(trainer.optimizer)
    generator = torch.Generator(device=on).manual_seed(number)
    for _, parameter in named_parameters(trainer.model):
        cast(Any, parameter).main_grad.normal_(0.0, 0.01, generator=generator)
    torch.cuda.synchronize()
    start = time.perf_counter()
    with cpu_layer.layer():
        norm, _ = update(trainer.optimizer, torch.zeros((), device=on), 1e9)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    trainer.scheduler.step(1)
    return float(norm), seconds


def weights_of(trainer: Any) -> list[Tensor]:
    from slime.megatron.model.build import named_parameters

    return [parameter.detach().to("cpu", copy=True) for _, parameter in named_parameters(trainer.model)]


def differing(ours: list[Tensor], theirs: list[Tensor]) -> int:
    return sum(not torch.equal(our, their) for our, their in zip(ours, theirs, strict=True))


def forget() -> None:
    """Free the memory of an earlier Trainer."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@dataclass
class Found:
    weights: list[Tensor]
    changed: int
    norms: list[float]
    seconds: float
    resting: float
    peak: float
    of_step: float
    """The GiB in use: between steps, at most in a whole training step, at most in an optimizer step."""


def steps(args: Args) -> Found:
    assert args.architecture is not None
    forget()
    with trainer_of(args) as trainer:
        start = weights_of(trainer)
        found = [made_up_step(trainer, number) for number in range(STEPS)]
        torch.cuda.reset_peak_memory_stats()
        found.append(made_up_step(trainer, STEPS))
        of_step = torch.cuda.max_memory_allocated() / 2**30
        weights, resting = weights_of(trainer), torch.cuda.memory_allocated() / 2**30
        changed = differing(weights, start)
        batch = batch_of([1024] * 4, args.architecture.vocab_size)
        trainer.train(0, batch)
        torch.cuda.reset_peak_memory_stats()
        trainer.train(1, batch)
        peak = torch.cuda.max_memory_allocated() / 2**30
    # the first step creates the state, and compiles
    seconds = min(seconds for _, seconds in found[1:])
    return Found(weights, changed, [norm for norm, _ in found], seconds, resting, peak, of_step)


def copies(size: int) -> float:
    """Return the seconds to copy `size` bytes to the device and as many back at once, pinned, in 256 MiB pieces."""
    piece = 256 * 2**20
    hosts = [torch.empty(piece, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    devices = [torch.empty(piece, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(max(size // piece, 1)):
            with torch.cuda.stream(streams[0]):
                devices[0].copy_(hosts[0], non_blocking=True)
            with torch.cuda.stream(streams[1]):
                hosts[1].copy_(devices[1], non_blocking=True)
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) * size / (max(size // piece, 1) * piece))
    return best


def saved_and_loaded(report: Report, what: str, *flags: str) -> None:
    """Check with two layers that each kind loads the other's checkpoint, and that the next steps are equal."""
    from slime.megatron.checkpoint.files import find_checkpoint
    from slime.megatron.checkpoint.save_load import load_checkpoint

    words = ("--num-layers 2 --vocab-size 32000 --max-tokens-per-gpu 4096 --lr 1e-3", *flags)
    with tempfile.TemporaryDirectory() as folder:
        ends: list[list[Tensor]] = []
        for name, more in (("plain", ""), ("host", OFFLOAD)):
            forget()
            with trainer_of(args_of("qwen3-0.6B", *words, f"--save {folder}/{name}", more)) as trainer:
                for number in range(2):
                    made_up_step(trainer, number)
                trainer.save(0, {})
                made_up_step(trainer, 2)
                ends.append(weights_of(trainer))
        wrong = differing(ends[1], ends[0])
        report.row(f"{what}: weights that differ after three steps", wrong, "0", wrong == 0)
        for name, more in (("plain", OFFLOAD), ("host", "")):
            forget()
            with trainer_of(args_of("qwen3-0.6B", *words, more)) as trainer:
                found = find_checkpoint(Path(folder) / name)
                assert found is not None
                load_checkpoint(found, model=trainer.model, optimizer=trainer.optimizer, scheduler=trainer.scheduler)
                made_up_step(trainer, 2)
                wrong = differing(weights_of(trainer), ends[0])
                other = f"loaded {'with' if more else 'without'} {OFFLOAD}, saved {'without' if more else 'with'}"
                report.row(f"{what}: {other}: weights that differ a step later", wrong, "0", wrong == 0)
                if more:
                    spoiled(report, what, trainer)


def spoiled(report: Report, what: str, trainer: Any) -> None:
    """Run a control: the next step starts with one bucket of moments that was not copied back."""
    from slime.megatron.optim.cpu_offload import BUCKET, MOMENTS
    from slime.megatron.optim.optimizer_state import parts_of

    [part] = parts_of(trainer.optimizer)
    host = part.optimizer.host  # pyright: ignore[reportAttributeAccessIssue]
    pinned = all(array.is_pinned() for array in host.arrays.values())
    report.row(f"{what}: {len(host.arrays)} arrays, pinned", pinned, True, pinned)
    steps = [state["step"] for state in part.optimizer.state.values()]
    live = [*trainer.model[0].parameters(), *steps, *host.arrays.values()]
    before = [tensor.detach().clone() for tensor in live]
    ends: list[list[Tensor]] = []
    for spoil in (False, False, True):
        with torch.no_grad():
            for tensor, kept in zip(live, before, strict=True):
                tensor.copy_(kept)
        if spoil:
            host.arrays[MOMENTS[0]][:BUCKET] = 0.0
        made_up_step(trainer, 4)
        ends.append(weights_of(trainer))
    again, lost = differing(ends[1], ends[0]), differing(ends[2], ends[0])
    report.row(f"{what}: control, weights that differ where a bucket is lost", lost, "> 0", lost > 0)
    report.row(f"{what}: the same step again", again, "0", again == 0)


@check(minutes=4)
def cpu_offload(report: Report) -> None:
    """Check --optimizer-cpu-offload: equal weights bit for bit, the memory that it frees, and the cost of a step."""
    words = "--max-tokens-per-gpu 4096 --lr 1e-3"
    plain = steps(args_of("qwen3-0.6B", words))
    there = steps(args_of("qwen3-0.6B", words, OFFLOAD))
    number = sum(weight.numel() for weight in plain.weights)
    wrong = differing(there.weights, plain.weights)
    what = f"Qwen3-0.6B, bf16, {STEPS + 1} steps"
    report.row(f"{what}: weights that differ, of {len(plain.weights)}", wrong, "0", wrong == 0)
    report.row(
        f"{what}: weights that the steps changed",
        plain.changed,
        len(plain.weights),
        plain.changed == len(plain.weights),
    )
    report.row(f"{what}: the norms are the same", there.norms == plain.norms, True, there.norms == plain.norms)
    state = COPIED * number / 2**30
    for name, before, after in (
        ("between steps", plain.resting, there.resting),
        ("at most in a training step of 4,096 tokens", plain.peak, there.peak),
        ("at most in an optimizer step", plain.of_step, there.of_step),
    ):
        least = 0.9 * state
        value = f"{before:.2f} GiB without, {after:.2f} with: {before - after:.2f} less"
        report.row(f"GPU memory {name}", value, f"{least:.2f} less of the state's {state:.2f}", before - after >= least)
    copied = copies(COPIED * number)
    value = f"{there.seconds * 1e3:.0f} ms; {plain.seconds * 1e3:.1f} without"
    limit = f"1.5 x {copied * 1e3:.0f} ms, plain copies of as many bytes each way at once"
    report.row("the optimizer step", value, limit, there.seconds <= 1.5 * copied)
    saved_and_loaded(report, "bf16")
    saved_and_loaded(report, "bf16, distributed optimizer", "--use-distributed-optimizer")
    saved_and_loaded(report, "fp32", "--no-bf16")
