"""Stages know the shapes of what they receive: no message asks for them, and no result changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import runs
import tiny
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from test_attention import SHAPE
from worker_pool import WorkerPool, joined

from slime.config.args import Args
from slime.megatron.microbatch import ContextParallel, pack_rows, tokens_on_rank
from slime.megatron.model.build import transformer_config
from slime.megatron.pipeline import PlannedCommunicator
from slime.megatron.trainer import Trainer

PARTS = {"num_layers_per_virtual_pipeline_stage": 1}
SMALL = {"max_tokens_per_gpu": 40}
"""Packs of different lengths, four or more."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP4": (4, {"pipeline_model_parallel_size": 4}),
    "PP2 x VPP2": (2, {"pipeline_model_parallel_size": 2, **PARTS}),
    "TP2 x PP2 x VPP2, groups of 3": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "pipeline_model_parallel_size": 2,
            **PARTS,
            "megatron_extra": {"microbatch_group_size_per_vp_stage": 3},
        },
    ),
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_dir(tmp_path_factory.mktemp("model"), "qwen3", num_layers=4)


class _Counting:
    """Counts the messages that hold shapes: three integers."""

    def __init__(self) -> None:
        self.shapes = 0
        self._exchange = torch.distributed.batch_isend_irecv

    def __call__(self, ops: list[Any]) -> Any:
        self.shapes += sum(op.tensor.dtype == torch.int64 for op in ops)
        return self._exchange(ops)


def _one_step(
    rank: int, world_size: int, init_method: str, args: Args, asks: bool
) -> tuple[int, np.ndarray, dict[str, float], runs.Arrays]:
    """Return the messages with shapes, log-probs before a step, its metrics without times, and the weights after it."""
    counting = _Counting()
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        with patch("torch.distributed.batch_isend_irecv", counting):
            if asks:
                with (
                    patch.object(PlannedCommunicator, "_communicate_shapes", P2PCommunicator._communicate_shapes),
                    patch.object(PlannedCommunicator, "finish"),
                ):
                    log_probs, metrics = trainer.log_probs(tiny.random_batch()), trainer.train(0, tiny.random_batch())
            else:
                log_probs, metrics = trainer.log_probs(tiny.random_batch()), trainer.train(0, tiny.random_batch())
        metrics = {name: value for name, value in metrics.items() if "time" not in name and "second" not in name}
        return counting.shapes, log_probs, metrics, runs.weights(trainer)
    finally:
        trainer.close()


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stages_exchange_no_shapes(layout: str, workers: WorkerPool, hf: Path) -> None:
    world_size, flags = LAYOUTS[layout]
    args = tiny.make_args(hf, **SMALL, **flags)
    planned, asked = (workers.run(world_size, _one_step, args, asks) for asks in (False, True))
    assert [found[0] for found in planned] == [0] * world_size
    assert all(found[0] > 0 for found in asked), "control: Megatron's own asks"
    for (_, log_probs, metrics, weights), (_, same_log_probs, same, same_weights) in zip(planned, asked, strict=True):
        assert metrics["train/num_micro_batches"] >= 4
        assert np.array_equal(log_probs, same_log_probs) and runs.difference(weights, same_weights) == 0
        assert metrics == same


def _mistakes(rank: int, world_size: int, init_method: str, args: Args) -> list[str]:
    """Return the errors of a stage that plans two micro-batches of 4 and 6 tokens and does something else."""
    found: list[str] = []
    with joined(args, rank, world_size, init_method):
        config = transformer_config(args)

        def tensor(tokens: int) -> torch.Tensor:
            return torch.zeros(tokens, 1, config.hidden_size)

        def error_of(*sent: int, forward_only: bool = True) -> None:
            communicator = PlannedCommunicator(config, [4, 6])
            try:
                for tokens in sent:
                    received = communicator._communicate_shapes(
                        tensor(tokens) if rank == 0 else None, None, rank == 1, False
                    )
                    assert rank == 0 or received[0] == [tokens, 1, config.hidden_size]
                communicator.finish(forward_only=forward_only)
            except RuntimeError as error:
                found.append(str(error))
            else:
                found.append("")

        for sent in ((4, 6), (4,), (4, 6, 4)):
            error_of(*sent)
        error_of(4, 6, forward_only=False)
        if rank == 0:
            error_of(6, 4)
    return found


@pytest.mark.dist
def test_another_tensor_than_planned_is_refused(workers: WorkerPool, hf: Path) -> None:
    first, second = workers.run(2, _mistakes, tiny.make_args(hf, pipeline_model_parallel_size=2))
    for found in (first, second):
        assert found[0] == "" and "1 tensors (activation" in found[1] and "more than planned (activ" in found[2]
        assert "2 tensors (gradient" in found[3]
    assert "activation to the next stage has shape [6, 1, " in first[4] and "receiver expects [4, 1, " in first[4]


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("multiple", [1, 4])
def test_sizes_are_known_before_packing(num_ranks: int, multiple: int) -> None:
    batch = tiny.random_batch()
    part = ContextParallel(num_ranks - 1, num_ranks)
    for rows in ([0], [3, 1], [2, 4, 5, 6], []):
        packed = pack_rows(batch, rows, arch=SHAPE, multiple=multiple, part=part)
        assert tokens_on_rank(batch, rows, part, multiple) == packed.tokens_B.size(1)
