"""One training step, cut in every way: loss, gradients and the weights after it stay the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
from runs import Outcome, difference
from worker_pool import WorkerPool

from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.megatron.trainer import Trainer

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5
# With a small epsilon Adam's first step is lr x sign(gradient): full steps even where a gradient is mere rounding.
# Gradients are those before clipping if clipping is off.
FLAGS: dict[str, Any] = {
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "entropy_coef": 0.01,
    "clip_grad": 0.0,
    "adam_eps": 1e-3,
}
OF_THE_CUT = {f"train/{name}" for name in ("num_micro_batches", "fill", "dp_imbalance", "tokens_per_second")}
"""Metrics that describe the cut and not the step."""


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the model, and another one of the same architecture as its reference."""
    root = tmp_path_factory.mktemp("models")
    return {family: tiny.hf_dir(root / family, family) for family in tiny.FAMILIES} | {
        f"{family}-ref": tiny.hf_dir(root / f"{family}-ref", family, seed=1) for family in tiny.FAMILIES
    }


def _args(hf: dict[str, Path], family: str = "glm4", **changes: Any) -> Args:
    """Train `family`; its reference is another model, so that the KL term counts."""
    return tiny.make_args(
        hf[family], **{**FLAGS, "load": str(hf[family]), "ref_load": str(hf[f"{family}-ref"]), **changes}
    )


def _same(found: Outcome, expected: Outcome) -> None:
    for got, wanted in zip(found.metrics, expected.metrics, strict=True):
        names = {name for name in wanted if name.startswith("train/")} - OF_THE_CUT
        assert names > {"train/loss", "train/kl_loss", "train/entropy", "train/logprob_gap_mean"}
        for name in sorted(names):
            assert got[name] == pytest.approx(wanted[name], rel=TOLERANCE, abs=1e-7), name
    assert difference(found.gradients, expected.gradients) <= TOLERANCE
    assert difference(found.weights, expected.weights) <= TOLERANCE
    assert np.abs(found.log_probs - expected.log_probs).max() <= 2e-5


def _train(workers: WorkerPool, args: Args, *batches: TrainBatch, ranks: int = 1) -> Outcome:
    outcomes = workers.run(ranks, runs.train, args, list(batches))
    for other in outcomes[1:]:
        assert other.metrics == outcomes[0].metrics, "metrics differ between ranks"
        assert np.array_equal(other.log_probs, outcomes[0].log_probs)
        assert difference(other.weights, outcomes[0].weights) == 0
    return outcomes[0]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    "cut",
    [
        {"max_tokens_per_gpu": 4096},
        {"max_tokens_per_gpu": 1},
        {"use_dynamic_batch_size": False, "micro_batch_size": 3},
        {"log_probs_chunk_size": 1000},
    ],
    ids=str,
)
def test_micro_batches(cut: dict[str, Any], per_token: bool, workers: WorkerPool, hf: dict[str, Path]) -> None:
    batch = tiny.random_batch()
    args = _args(hf, calculate_per_token_loss=per_token)
    _same(_train(workers, replace(args, **cut), batch), _train(workers, args, batch))


def test_control_the_other_mean_is_another_loss(workers: WorkerPool, hf: dict[str, Path]) -> None:
    batch = tiny.random_batch()
    per_sample = _train(workers, _args(hf), batch)
    per_token = _train(workers, _args(hf, calculate_per_token_loss=True), batch)
    assert difference(per_token.gradients, per_sample.gradients) > 1e-2


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel(family: str, sequence_parallel: bool, workers: WorkerPool, hf: dict[str, Path]) -> None:
    batches = [tiny.random_batch(seed=seed) for seed in (0, 1)]
    args = _args(hf, family)
    parallel = replace(args, tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    _same(_train(workers, parallel, *batches, ranks=2), _train(workers, args, *batches))


@pytest.mark.parametrize("num_samples", [8, 4])
@pytest.mark.parametrize("balance", [False, True])
def test_data_parallel(num_samples: int, balance: bool, workers: WorkerPool, hf: dict[str, Path]) -> None:
    batch = tiny.random_batch(num_samples)
    args = _args(hf, balance_data=balance)
    _same(_train(workers, args, batch, ranks=2), _train(workers, args, batch))


def test_balance_data_only_evens_out_ranks(workers: WorkerPool, hf: dict[str, Path]) -> None:
    """Samples are in the order of their lengths: dealt in that order, one rank gets all long ones."""
    batch = tiny.random_batch(lengths=range(3, 43, 5))
    in_order = _train(workers, _args(hf), batch, ranks=2)
    balanced = _train(workers, _args(hf, balance_data=True), batch, ranks=2)
    _same(balanced, in_order)
    assert in_order.metrics[0]["train/dp_imbalance"] > 1.25
    assert balanced.metrics[0]["train/dp_imbalance"] < 1.05


def test_a_rank_without_samples(workers: WorkerPool, hf: dict[str, Path]) -> None:
    batch = tiny.random_batch(2, group=2)
    args = _args(hf)
    _same(_train(workers, args, batch, ranks=4), _train(workers, args, batch))


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1, "max_tokens_per_gpu": 1},
        {"context_parallel_size": 2},
    ],
    ids=str,
)
def test_with_data_parallel_and_three_steps(layout: dict[str, Any], workers: WorkerPool, hf: dict[str, Path]) -> None:
    """Old log-probs are computed before the first step; with a budget of 1, each micro-batch is one sample."""
    batch = tiny.random_batch(12)
    args = _args(hf, num_steps_per_rollout=3)
    parallel = replace(args, **layout)
    _same(_train(workers, parallel, batch, ranks=4), _train(workers, args, batch))


def test_context_parallel_ranks_without_responses(workers: WorkerPool, hf: dict[str, Path]) -> None:
    batch = tiny.random_batch(2, group=2, lengths=[1, 2])
    args = _args(hf)
    _same(_train(workers, replace(args, context_parallel_size=4), batch, ranks=4), _train(workers, args, batch))


class _Losing(Trainer):
    """A trainer with a bug: it loses the last micro-batch's weights."""

    def _packs(self, own: TrainBatch, steps: Any) -> Any:
        if own.has("loss_weights"):
            weights = [row.copy() for row in own.rows("loss_weights")]
            for row in steps[-1].micro_batches[-1]:
                weights[row][:] = 0
            own = own.with_column("loss_weights", np.concatenate(weights))
        return super()._packs(own, steps)


def _train_losing(rank: int, world_size: int, init_method: str, args: Args, batch: TrainBatch) -> str:
    trainer = _Losing(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        with pytest.raises(RuntimeError) as raised:
            trainer.train(7, batch)
        return str(raised.value)
    finally:
        trainer.close()


@pytest.mark.parametrize("stages", [1, 2])
def test_a_wrong_denominator_is_caught(stages: int, workers: WorkerPool, hf: dict[str, Path]) -> None:
    """All ranks raise: of two stages, the last one sees the weights and the first one learns it from there."""
    args = _args(hf, kl_loss_coef=0.0, pipeline_model_parallel_size=stages)
    messages = workers.run(2, _train_losing, args, tiny.random_batch())
    assert all("rollout 7, step 0: the loss weights" in message and "not to 1" in message for message in messages)
