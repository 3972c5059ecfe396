"""A trainer that slept trains like one that did not, and leaves nothing on the device while it sleeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
from worker_pool import WorkerPool

from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.megatron.offload import host_memory
from slime.megatron.offload.host_memory import HostMemory

BATCHES = [tiny.random_batch(seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_dir(tmp_path_factory.mktemp("hf"), "glm4")


def size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def weights(trainer: Any) -> runs.Arrays:
    """Return copies: numpy views would keep their memory from being freed."""
    return {name: tensor.float().clone().numpy() for name, tensor in trainer.iter_hf_tensors()}


def with_naps(
    rank: int, world_size: int, init_method: str, args: Args, batches: list[TrainBatch], spoil: bool = False
) -> tuple[list[dict[str, float]], runs.Arrays]:
    """Train with a sleep before each batch, during which everything must be empty; `spoil` is a control."""
    from slime.megatron.offload.trainer_memory import SMALL, TrainerMemory
    from slime.megatron.optim.optimizer_state import parts_of
    from slime.megatron.trainer import Trainer

    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        memory = TrainerMemory(trainer.model, trainer.optimizer)
        assert memory.reload() == 0, "nothing is away"
        wrapped: Any = trainer.model[0]
        metrics: list[dict[str, float]] = []
        for number, batch in enumerate(batches):
            before = weights(trainer)
            moved = memory.offload_optimizer()
            sent = weights(trainer)
            assert all(np.array_equal(sent[name], before[name]) for name in before), "weights can still be sent"
            moved += memory.offload_weights()
            assert memory.offload_weights() == memory.offload_optimizer() == 0, "they are away"
            optimizers = [part.optimizer for part in parts_of(trainer.optimizer)]
            states = [s[name] for o in optimizers for s in o.state.values() for name in ("exp_avg", "exp_avg_sq")]
            assert (number == 0) == (not states), "Adam makes its state at the first step"
            left = [*states, *wrapped.parameters(), *(buffer.grad_data for buffer in wrapped.buffers)]
            left += [p for o in optimizers for group in o.param_groups for p in group["params"]]
            small = [tensor for tensor in left if 0 < tensor.untyped_storage().nbytes() <= SMALL]
            assert size(left) == size(small), "only what is worth nothing stays"
            if spoil:
                memory._state._host._chunks[0].zero_()
            assert memory.reload() == moved
            assert not any(buffer.grad_data.any() for buffer in wrapped.buffers)
            metrics.append(trainer.train(number, batch))
        return metrics, weights(trainer)
    finally:
        trainer.close()


@pytest.mark.dist
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"bf16": True},
        {"bf16": True, "use_distributed_optimizer": True},
        {"use_distributed_optimizer": True},
        {"bf16": True, "optimizer_cpu_offload": True},
    ],
)
def test_training_continues_bit_for_bit(workers: WorkerPool, hf: Path, flags: dict[str, Any]) -> None:
    args = tiny.make_args(hf, lr=1e-2, use_kl_loss=True, kl_loss_coef=0.1, **flags)
    awake = workers.run(2, runs.train, replace(args, optimizer_cpu_offload=False), BATCHES)[0]
    metrics, found = workers.run(2, with_naps, args, BATCHES)[0]
    assert all(np.array_equal(found[name], awake.weights[name]) for name in awake.weights)
    assert [m["train/loss"] for m in metrics] == [m["train/loss"] for m in awake.metrics]
    if flags == {"bf16": True}:
        _, spoiled = workers.run(2, with_naps, args, BATCHES, True)[0]
        assert any(not np.array_equal(spoiled[name], found[name]) for name in found)


def test_host_memory_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "CHUNK", 64)
    memory = HostMemory()
    for lengths in ([10], [100, 1, 63, 64, 0, 200], [5, 5]):
        tensors = [torch.randint(0, 256, (length,), dtype=torch.uint8) for length in lengths]
        copies = [tensor.clone() for tensor in tensors]
        assert memory.store(tensors) == sum(lengths)
        for tensor in tensors:
            tensor.zero_()
        assert memory.restore(tensors) == sum(lengths)
        assert all(map(torch.equal, tensors, copies))
    assert [len(chunk) for chunk in memory._chunks[:-1]] == [64] * 6
