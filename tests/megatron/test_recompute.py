"""Recomputation: the gradients are the same, and layers really run twice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from worker_pool import WorkerPool

from slime.config.args import Args
from slime.megatron.model.build import unwrap
from slime.megatron.trainer import Trainer

pytestmark = pytest.mark.dist

NUM_LAYERS = 4
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 process": (1, {}),
    "TP2 x PP2": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
}
FULL = {"recompute_granularity": "full"}
KINDS: dict[str, tuple[dict[str, Any], tuple[float, float, float]]] = {
    "uniform 1": ({**FULL, "recompute_method": "uniform", "recompute_num_layers": 1}, (2, 2, 2)),
    "uniform 2": ({**FULL, "recompute_method": "uniform", "recompute_num_layers": 2}, (2, 2, 2)),
    "block": ({**FULL, "recompute_method": "block", "recompute_num_layers": 4}, (2, 2, 2)),
    "selective": ({"recompute_granularity": "selective"}, (1, 2, 1)),
    "selective mlp": (
        {"recompute_granularity": "selective", "megatron_extra": {"recompute_modules": ["mlp"]}},
        (1, 1, 2),
    ),
}
"""Flags, and how often each layer, its core attention and its MLP run in a training step."""


@dataclass
class Seen:
    gradients: runs.Arrays
    calls: tuple[float, float, float]
    """How often each layer, core attention and MLP ran in each micro-batch."""


def _train(rank: int, world_size: int, init_method: str, args: Args) -> Seen:
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        calls = [0, 0, 0]

        def count(module: torch.nn.Module, kind: int) -> None:
            def hook(*_: Any) -> None:
                calls[kind] += 1

            module.register_forward_pre_hook(hook)

        built: Any = unwrap(trainer.model[0]).decoder.layers
        for layer in built:
            for kind, module in enumerate((layer, layer.self_attention.core_attention, layer.mlp)):
                count(module, kind)
        metrics = trainer.train(0, tiny.random_batch())
        runs_once = metrics["train/num_micro_batches"] * len(built)
        layers, attentions, mlps = (number / runs_once for number in calls)
        return Seen(runs.gradients(trainer), (layers, attentions, mlps))
    finally:
        trainer.close()


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_dir(tmp_path_factory.mktemp("model"), "glm4", num_layers=NUM_LAYERS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_gradients_and_layers_that_run_twice(layout: str, workers: WorkerPool, hf: Path) -> None:
    ranks, flags = LAYOUTS[layout]
    args = tiny.make_args(hf, hidden_dropout=0.1, **flags)  # with dropout the second forward must draw the same numbers

    def seen(**recompute: Any) -> list[Seen]:
        return workers.run(ranks, _train, replace(args, **recompute))

    plain = seen()
    assert all(rank.calls == (1, 1, 1) for rank in plain)
    for kind, (recompute, calls) in KINDS.items():
        for rank, expected in zip(seen(**recompute), plain, strict=True):
            assert rank.calls == calls, kind
            assert runs.difference(rank.gradients, expected.gradients) <= 1e-6, kind
    undropped = seen(hidden_dropout=0.0)  # control
    assert runs.difference(undropped[0].gradients, plain[0].gradients) > 1e-2


@pytest.mark.parametrize("stages", [1, 2])
def test_block_recomputes_that_many_layers_per_stage(stages: int, workers: WorkerPool, hf: Path) -> None:
    args = tiny.make_args(
        hf,
        pipeline_model_parallel_size=stages,
        recompute_granularity="full",
        recompute_method="block",
        recompute_num_layers=1,
    )
    for rank in workers.run(stages, _train, args):
        assert rank.calls[0] == 1 + stages / NUM_LAYERS
