"""The kinds of optimizers against each other (plain, sharded over data parallelism, fused, SGD), and after loading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
from made_up import Run, make_args, same_bits
from runs import Outcome, difference
from torch import Tensor
from worker_pool import WorkerPool, joined

from slime.config.args import Args

pytestmark = pytest.mark.dist


def states(run: Run) -> list[dict[str, Tensor]]:
    from slime.megatron.optim.optimizer_state import parts_of

    return [state for part in parts_of(run.optimizer) for state in part.optimizer.state.values()]


def steps(run: Run) -> set[float]:
    return {float(state["step"]) for state in states(run)}


@contextmanager
def megatrons_own(*names: str) -> Iterator[None]:
    """Run without our correction of these methods."""
    from slime.megatron.optim.adam import TorchDistributedOptimizer

    corrections = {name: TorchDistributedOptimizer.__dict__[name] for name in names}
    for name in names:
        delattr(TorchDistributedOptimizer, name)
    try:
        yield
    finally:
        for name, correction in corrections.items():
            setattr(TorchDistributedOptimizer, name, correction)


def loaded_and_stepped(run: Run, path: Path, *, off_by: int = 0) -> tuple[dict[str, Tensor], set[float], int]:
    """Return the weights one step after loading, the steps that Adam counts, and how many separate step tensors."""
    run.load(path)
    for state in states(run):
        state["step"] += off_by
    run.step(2)
    return run.weights(), steps(run), len({state["step"].data_ptr() for state in states(run)})


def keeps_its_settings(run: Run, path: Path) -> None:
    """Settings come from the current flags, not from those of the run that wrote the checkpoint."""
    before = [dict(group) for group in run.optimizer.param_groups]
    run.load(path)
    for group, own in zip(run.optimizer.param_groups, before, strict=True):
        assert group["betas"] == own["betas"] and group["betas"][1] == 0.5 and group["fused"]
        assert {k: v for k, v in group.items() if k in own.keys() - {"params", "lr"}} == {
            k: v for k, v in own.items() if k not in ("params", "lr")
        }


def corrected(rank: int, world_size: int, init_method: str, args: Args) -> None:
    """Check each correction of Megatron's distributed optimizer, and the error without it."""
    with joined(args, rank, world_size, init_method) as topology:
        run = Run(args, topology)
        with megatrons_own("state_dict"), pytest.raises(AssertionError):
            run.optimizer.state_dict()
        fresh: Any = run.optimizer.state_dict()
        assert {group["step"] for group in fresh["optimizer"]["param_groups"]} == {0.0}

        run.initialize()
        run.step(0)
        run.step(1)
        path = run.save(1)
        run.step(2)
        unbroken, number = run.weights(), len(states(run))
        assert steps(run) == {3.0} and number > 1

        weights, counted, apart = loaded_and_stepped(Run(args, topology), path)
        assert (counted, apart) == ({3.0}, number) and same_bits(weights, unbroken)
        # the same into an optimizer that already has state
        weights, counted, apart = loaded_and_stepped(run, path)
        assert (counted, apart) == ({3.0}, number) and same_bits(weights, unbroken)
        keeps_its_settings(Run(replace(args, adam_beta2=0.5), topology), path)
        weights, counted, _ = loaded_and_stepped(run, path, off_by=1)
        assert counted == {4.0} and not same_bits(weights, unbroken)
        with megatrons_own("load_state_dict"):
            weights, counted, apart = loaded_and_stepped(Run(args, topology), path)
        assert apart == 1 and counted == {2.0 + number} and not same_bits(weights, unbroken)


@pytest.mark.parametrize("bf16", [False, True])
def test_corrections_of_megatron_without_transformer_engine(workers: WorkerPool, tmp_path: Path, bf16: bool) -> None:
    """The worst one is a step tensor shared by all parameters after loading, which only wrong weights reveal."""
    workers.run(2, corrected, make_args(tmp_path, bf16=bf16, use_distributed_optimizer=True))


def plain_steps(rank: int, world_size: int, init_method: str, args: Args) -> None:
    with joined(args, rank, world_size, init_method) as topology:
        run = Run(args, topology)
        run.initialize()
        run.step(0)
        run.step(1)
        path = run.save(1)
        run.step(2)
        number = len(states(run))
        weights, counted, apart = loaded_and_stepped(Run(args, topology), path)
        assert (counted, apart) == ({3.0}, number) and same_bits(weights, run.weights())
        keeps_its_settings(Run(replace(args, adam_beta2=0.5), topology), path)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_plain_optimizer_shares_no_step_either(workers: WorkerPool, tmp_path: Path, bf16: bool) -> None:
    workers.run(1, plain_steps, make_args(tmp_path, bf16=bf16))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_dir(tmp_path_factory.mktemp("hf"), "glm4")


def three_steps(workers: WorkerPool, hf: Path, world_size: int, **flags: Any) -> Outcome:
    defaults: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "adam_eps": 1e-3, "clip_grad": 0.5}
    args = tiny.make_args(hf, **{**defaults, **flags})
    batches = [tiny.random_batch(seed=seed) for seed in range(3)]
    return workers.run(world_size, runs.train, args, batches)[0]


def norms(found: Outcome) -> np.ndarray:
    return np.array([metrics["train/grad_norm"] for metrics in found.metrics])


@pytest.mark.parametrize("bf16", [False, True])
def test_the_sharded_optimizer_equals_the_plain_one(workers: WorkerPool, hf: Path, bf16: bool) -> None:
    """Without clipping the result is bit-identical. The norm is summed in another order, which clipping passes on."""
    layout: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "bf16": bf16}
    plain = three_steps(workers, hf, 4, clip_grad=0.0, **layout)
    sharded = three_steps(workers, hf, 4, clip_grad=0.0, use_distributed_optimizer=True, **layout)
    assert difference(sharded.weights, plain.weights) == 0
    np.testing.assert_allclose(norms(sharded), norms(plain), rtol=1e-5)
    clipped = three_steps(workers, hf, 4, use_distributed_optimizer=True, **layout)
    assert difference(clipped.weights, plain.weights) > 1e-2, "clipping is of consequence"
    plain = three_steps(workers, hf, 4, **layout)
    np.testing.assert_allclose(norms(clipped), norms(plain), rtol=1e-3 if bf16 else 1e-5)
    assert difference(clipped.weights, plain.weights) <= (2**-8 if bf16 else 1e-6)  # one rounding to bf16


@pytest.mark.parametrize("sharded", [False, True])
def test_overlapped_reduction_is_the_same(workers: WorkerPool, hf: Path, sharded: bool) -> None:
    """Gradients are reduced in buckets while the last micro-batch's backward pass still runs."""
    flags: dict[str, Any] = {"use_distributed_optimizer": sharded, "max_tokens_per_gpu": 64, "clip_grad": 0.0}
    at_once = three_steps(workers, hf, 2, **flags)
    assert at_once.metrics[0]["train/num_micro_batches"] > 1
    overlapped = three_steps(workers, hf, 2, megatron_extra={"overlap_grad_reduce": True, "bucket_size": 5000}, **flags)
    assert difference(overlapped.weights, at_once.weights) == 0
    assert np.array_equal(overlapped.log_probs, at_once.log_probs)


def stepped(rank: int, world_size: int, init_method: str, args: Args, fused: bool) -> dict[str, Tensor]:
    from slime.megatron.optim.optimizer_state import parts_of

    with joined(args, rank, world_size, init_method) as topology:
        run = Run(args, topology)
        run.initialize()
        for part in parts_of(run.optimizer):
            for group in part.optimizer.param_groups:
                assert group["fused"]
                group["fused"] = fused
        for number in range(5):
            run.step(number)
        return run.weights()


def test_fused_adam_equals_adam(workers: WorkerPool) -> None:
    fused, single = (workers.run(1, stepped, make_args(None), choice)[0] for choice in (True, False))
    assert max((fused[name] - single[name]).abs().max().item() for name in fused) < 1e-6


def sgd(rank: int, world_size: int, init_method: str, args: Args, load: Path | None, numbers: list[int]) -> Any:
    """Resume from the checkpoint, or save halfway: return weights before and after, or the error."""
    with joined(args, rank, world_size, init_method) as topology:
        run = Run(args, topology)
        run.initialize()
        try:
            if load is not None:
                run.load(load)
        except ValueError as error:
            return str(error)
        start = run.weights()
        for number in numbers:
            run.step(number)
            if args.save is not None and number == 1:
                run.save(1)
        return start, run.weights()


@pytest.mark.parametrize(("bf16", "momentum"), [(False, 0.9), (True, 0.9), (True, 0.0)])
def test_sgd_resumes_where_it_stopped(workers: WorkerPool, tmp_path: Path, bf16: bool, momentum: float) -> None:
    flags: dict[str, Any] = {"optimizer": "sgd", "sgd_momentum": momentum, "bf16": bf16}
    start, unbroken = workers.run(1, sgd, make_args(tmp_path, **flags), None, [0, 1, 2, 3])[0]
    _, resumed = workers.run(2, sgd, make_args(None, tp=2, **flags), tmp_path, [2, 3])[0]
    assert same_bits(resumed, unbroken) and not same_bits(unbroken, start)
    args = make_args(None, **{**flags, "sgd_momentum": 0.9 - momentum})
    [error] = workers.run(1, sgd, args, tmp_path, [])
    assert f"iter_0000001 holds the optimizer state of sgd with{'out' * (not momentum)} momentum, and this" in error
    assert "give --no-load-optim" in error


def sgd_step(rank: int, world_size: int, init_method: str, args: Args) -> tuple[dict[str, Tensor], ...]:
    """Return weights, gradients and weights after the step, by HF name."""
    with joined(args, rank, world_size, init_method) as topology:
        run = Run(args, topology)
        run.initialize()
        gradients = dict(pair for name in run.parameters for pair in run.table.to_hf(name, run.shard(name, 0)))
        start = run.weights()
        run.step(0)
        return start, gradients, run.weights()


def test_one_sgd_step_by_hand(workers: WorkerPool) -> None:
    args = make_args(None, optimizer="sgd", sgd_momentum=0.9, weight_decay=0.1)
    start, gradients, end = workers.run(1, sgd_step, args)[0]
    for name, weight in start.items():
        decay = 0.1 if weight.dim() > 1 else 0.0  # Megatron does not decay biases and norms
        torch.testing.assert_close(end[name], weight - 1e-2 * (gradients[name] + decay * weight))
