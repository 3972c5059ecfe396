"""Mixtures of experts: against transformers, in every layout, over checkpoints and weight sync, with replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_against_huggingface as reference
import tiny
from runs import Outcome, difference, train
from worker_pool import WorkerPool

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny.hf_dir(tmp_path_factory.mktemp(family), family) for family in tiny.MIXTURES}


def per_expert(tensors: dict[str, Any]) -> dict[str, Any]:
    """transformers' tensors by the names that files have: of all experts in one, each its own."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        head, _, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            for expert, both in enumerate(tensor):
                for half, part in zip(("gate", "up"), np.split(both, 2), strict=True):
                    found[f"{head}.experts.{expert}.{half}_proj.weight"] = part
        elif kind == "down_proj":
            found |= {f"{head}.experts.{expert}.down_proj.weight": part for expert, part in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_logits_loss_and_gradients_are_transformers(
    family: str, workers: WorkerPool, mixtures: dict[str, Path]
) -> None:
    hf = mixtures[family]
    [found] = workers.run(1, reference._megatron, tiny.make_args(hf), hf, reference.LENGTHS)
    logits, loss, gradients = reference._huggingface(family)
    worst = reference._worst(found, (logits, loss, per_expert(gradients)))
    assert max(worst.values()) <= TOLERANCE, worst


RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "TP2, ETP2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "TP2 x EP2, ETP1": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "use_distributed_optimizer": True,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        },
    ),
    "PP2 x EP2, recompute": (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "decoder_last_pipeline_num_layers": 1,
            "expert_model_parallel_size": 2,
            **RECOMPUTE,
        },
    ),
    "CP2 x EP2, distributed optimizer": (
        4,
        {
            "context_parallel_size": 2,
            "max_tokens_per_gpu": 40,
            "expert_model_parallel_size": 2,
            "use_distributed_optimizer": True,
        },
    ),
    "ETP2 x EP2": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 2,
        },
    ),
}
FLAGS: dict[str, Any] = {"lr": 1e-2, "adam_eps": 1e-3, "clip_grad": 0.05, "entropy_coef": 0.01}


def outcome(workers: WorkerPool, hf: Path, size: int = 1, **flags: Any) -> Outcome:
    batches = [tiny.random_batch(seed=seed, with_rollout=False) for seed in (0, 1)]
    return workers.run(size, train, tiny.make_args(hf, **{**FLAGS, **flags}), batches)[-1]


@pytest.fixture(scope="module")
def alone(workers: WorkerPool, mixtures: dict[str, Path]) -> dict[str, Outcome]:
    return {family: outcome(workers, hf) for family, hf in mixtures.items()}


def worst_of(found: Outcome, expected: Outcome, *, with_gradients: bool) -> dict[str, float]:
    worst = {
        "log-probs": float(np.abs(found.log_probs - expected.log_probs).max()),
        "weights": difference(found.weights, expected.weights),
    }
    if with_gradients:  # with a distributed optimizer a rank has a part of them
        worst["gradients"] = difference(found.gradients, expected.gradients)
    for name in ("train/loss", "train/grad_norm"):
        pairs = zip(found.metrics, expected.metrics, strict=True)
        worst[name] = max(abs(ours[name] - theirs[name]) / abs(theirs[name]) for ours, theirs in pairs)
    return worst


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, workers: WorkerPool, mixtures: dict[str, Path], alone: dict[str, Outcome]) -> None:
    size, flags = LAYOUTS[layout]
    for family in tiny.MIXTURES:
        found = outcome(workers, mixtures[family], size, **flags)
        worst = worst_of(found, alone[family], with_gradients=not flags.get("use_distributed_optimizer"))
        print(layout, family, worst)
        assert max(worst.values()) <= TOLERANCE, (family, worst)
