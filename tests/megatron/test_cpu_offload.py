"""The optimizer's state in host memory: steps, checkpoints and loading equal those with the state on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import Run, make_args, same_bits
from torch import Tensor
from worker_pool import WorkerPool, joined

from slime.config.args import Args

BUCKET = 1024  # some weights span several buckets, and some buckets hold several weights


@contextmanager
def small_buckets() -> Iterator[None]:
    from slime.megatron.optim import cpu_offload

    usual, cpu_offload.BUCKET = cpu_offload.BUCKET, BUCKET
    try:
        yield
    finally:
        cpu_offload.BUCKET = usual


def step(run: Run, number: int) -> float:
    """Do what `take_step` does at its end: norm, clipping, Adam; return the norm."""
    from slime.megatron.compat import cpu_layer
    from slime.megatron.optim.optimizer import update

    with cpu_layer.layer():
        run.optimizer.zero_grad()
        for name, parameter in run.parameters.items():
            parameter.main_grad.copy_(run.shard(name, number))  # pyright: ignore
        norm, _ = update(run.optimizer, torch.zeros(()), 1e9)
        run.scheduler.step(1)
        return float(norm)


def adam_of(run: Run) -> Any:
    from slime.megatron.optim.optimizer_state import parts_of

    [part] = parts_of(run.optimizer)
    return part.optimizer


def state(run: Run) -> dict[str, Tensor]:
    """Return main weights, moments and steps, in the optimizer's order."""
    adam = adam_of(run)
    found: dict[str, Tensor] = {}
    for number, weight in enumerate(weight for group in adam.param_groups for weight in group["params"]):
        found[f"{number} main"] = weight.detach().clone()
        found |= {f"{number} {name}": tensor.clone() for name, tensor in adam.state[weight].items()}
    return found


def is_on_host(run: Run) -> bool:
    """True if the whole state is in the flat arrays, including main weights if there are any."""
    from slime.megatron.optim.cpu_offload import MAIN, MOMENTS, HostAdamW, HostWeight

    adam = adam_of(run)
    if type(adam) is not HostAdamW:
        return False
    arrays = {name: array.untyped_storage().data_ptr() for name, array in adam.host.arrays.items()}
    weights = [weight for group in adam.param_groups for weight in group["params"]]
    moments = all(adam.state[w][name].untyped_storage().data_ptr() == arrays[name] for w in weights for name in MOMENTS)
    mains = [weight for weight in weights if isinstance(weight, HostWeight)]
    assert len(mains) == (len(weights) if run.args.bf16 else 0)
    cut = any(len(pieces) > 1 for pieces in adam.host.buckets) and len(adam.host.buckets) > 3
    return moments and cut and all(main.untyped_storage().data_ptr() == arrays[MAIN] for main in mains)


def written(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*.distcp"))


def started(args: Args, topology: Any, *, steps: int) -> Run:
    run = Run(args, topology)
    run.initialize()
    for number in range(steps):
        step(run, number)
    return run


def loaded(args: Args, topology: Any, path: Path) -> Run:
    run = Run(args, topology)
    run.load(path)
    return run


def compared(rank: int, world_size: int, init_method: str, args: Args, folder: Path) -> None:
    here, there = args, replace(args, optimizer_cpu_offload=True)
    with joined(args, rank, world_size, init_method) as topology, small_buckets():
        plain, host = started(here, topology, steps=0), started(there, topology, steps=0)
        assert not adam_of(host).state, "Adam makes its state at the first step, here too"
        for number in range(3):
            norm = step(plain, number)
            assert norm > args.clip_grad, "clipping is of consequence"
            assert step(host, number) == norm
            assert same_bits(host.weights(), plain.weights()) and same_bits(state(host), state(plain))
        assert is_on_host(host) and not is_on_host(plain)

        plain.args, host.args = replace(args, save=str(folder / "plain")), replace(there, save=str(folder / "host"))
        saved = {"plain": plain.save(3), "host": host.save(3)}
        assert abs(written(saved["host"]) / written(saved["plain"]) - 1) < 0.02, "no file holds a whole array"
        step(plain, 3)
        unbroken = plain.weights(), state(plain)
        # into a new optimizer, and into one that has taken other steps
        used = started(there, topology, steps=1)
        used.load(saved["plain"])
        for run in (loaded(there, topology, saved["plain"]), used, loaded(here, topology, saved["host"])):
            step(run, 3)
            assert same_bits(run.weights(), unbroken[0]) and same_bits(state(run), unbroken[1])
        assert is_on_host(used)

        # without the optimizer: main weights are the loaded weights, rounded
        weights = Run(there, topology), Run(here, topology)
        for run in weights:
            run.load(saved["plain"], optimizer=False)
            run.optimizer.reload_model_params()
            step(run, 3)
        assert same_bits(weights[0].weights(), weights[1].weights())

        # control: one bucket that was not copied back
        array = adam_of(host).host.arrays["exp_avg"]
        before = array[BUCKET : 2 * BUCKET].clone()
        step(host, 3)
        assert same_bits(host.weights(), unbroken[0])
        array[BUCKET : 2 * BUCKET] = before
        for run in (host, plain):
            step(run, 4)
        assert not same_bits(host.weights(), plain.weights())


@pytest.mark.dist
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_offloaded_steps_are_bit_identical(workers: WorkerPool, tmp_path: Path, bf16: bool, sharded: bool) -> None:
    args = make_args(tmp_path, bf16=bf16, use_distributed_optimizer=sharded, clip_grad=0.5, weight_decay=0.1)
    workers.run(1 + sharded, compared, args, tmp_path)


def test_bad_steps_and_missing_gradients_change_nothing() -> None:
    from slime.megatron.compat import cpu_layer
    from slime.megatron.optim.cpu_offload import HostAdamW, HostState

    cpu_layer.install()
    with small_buckets():
        weights = [torch.randn(size) for size in (1500, 7, 0, 3000)]
        adam: Any = torch.optim.AdamW([weight.clone() for weight in weights], lr=0.1, fused=True)
        same: Any = torch.optim.AdamW([weight.clone() for weight in weights], lr=0.1, fused=True)
        adam.__class__ = HostAdamW
        ours, theirs = adam.param_groups[0]["params"], same.param_groups[0]["params"]
        adam.one_pass, adam.model_of, adam.host = False, {}, HostState([], ours)
        for number in range(4):
            for our, their in zip(ours, theirs, strict=True):
                our.grad = None if number == 2 and our is ours[0] else torch.randn(our.shape)
                their.grad = None if our.grad is None else our.grad.clone()
            adam.step()
            same.step()
            assert all(map(torch.equal, ours, theirs))
        assert [float(adam.state[weight]["step"]) for weight in ours] == [3.0, 4.0, 4.0, 4.0]


def test_a_gradient_on_another_device() -> None:
    """torch itself refuses such a gradient."""
    from slime.megatron.optim.cpu_offload import HostWeight

    weight: Any = torch.ones(3)
    with pytest.raises(RuntimeError):
        weight.grad = torch.zeros(3, device="meta")
    weight.__class__ = HostWeight
    weight.grad = torch.zeros(3, device="meta")
    assert weight.grad.device.type == "meta" and type(weight + 1) is Tensor
    weight.grad = None
    assert weight.grad is None


def test_another_adam_is_refused() -> None:
    from slime.megatron.optim.cpu_offload import install

    class Part:
        optimizer = torch.optim.Adam([torch.ones(1)], fused=True)

    with pytest.raises(ValueError, match="--optimizer-cpu-offload: it requires PyTorch's fused AdamW, and Megatron"):
        install(Part())  # pyright: ignore[reportArgumentType]
