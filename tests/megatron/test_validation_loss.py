"""The validation loss equals Hugging Face's in any layout, and computing it changes nothing of training."""

from __future__ import annotations

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
from slime.megatron.share import Share
from slime.megatron.trainer import Trainer
from slime.megatron.validation_loss import validation_losses

pytestmark = pytest.mark.dist

NUM_ROWS = 7


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_dir(tmp_path_factory.mktemp("model"), "qwen3")


def make_batch(seed: int, num_rows: int = NUM_ROWS) -> TrainBatch:
    """Make rows of several turns: masks of 0, 1 and 0.5, each row with a trained token."""
    rng = np.random.default_rng(seed)
    responses = rng.integers(2, 30, num_rows)
    totals = responses + rng.integers(2, 9, num_rows)
    mask = rng.choice([0.0, 1.0, 0.5], responses.sum()).astype(np.float32)
    mask[np.cumsum(responses) - 1] = 1
    columns = {
        "tokens": rng.integers(0, tiny.VOCAB, totals.sum()),
        "loss_mask": mask,
        "rewards": np.zeros(num_rows, dtype=np.float32),
        "group_indices": np.arange(num_rows),
        "sample_indices": np.arange(num_rows),
    }
    return TrainBatch(totals, responses, columns)


def by_huggingface(batch: TrainBatch, *, shift: int = 0) -> tuple[float, float]:
    """Return both means in float64, one row at a time. `shift` moves every row's mask."""
    model = tiny.hf_model("qwen3").double()
    sums: list[float] = []
    counts: list[float] = []
    rows = zip(batch.rows("tokens"), batch.response_lengths_N, batch.rows("loss_mask"), strict=True)
    for tokens, length, mask in rows:
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)[None]).logits[0]
        weights = torch.from_numpy(np.roll(mask, shift)).double()
        losses = torch.nn.functional.cross_entropy(
            logits[-length - 1 : -1], torch.from_numpy(tokens[-length:]), reduction="none"
        )
        sums.append(float((losses * weights).sum()))
        counts.append(float(weights.sum()))
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    return sum(sums) / sum(counts), sum(means) / len(means)


def losses(rank: int, world_size: int, init_method: str, args: Args, batch: TrainBatch) -> dict[str, float]:
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        share = trainer.share(batch, 1)
        return validation_losses(share, trainer.own_log_probs(share))
    finally:
        trainer.close()


def sft(hf: Path, **changes: Any) -> Args:
    return tiny.make_args(hf, **({"loss_type": "sft_loss", "max_tokens_per_gpu": 500} | changes))


def test_the_loss_is_huggingfaces(workers: WorkerPool, hf: Path) -> None:
    batch = make_batch(1)
    loss, per_sample = by_huggingface(batch)
    layouts = (
        (1, sft(hf, rollout_temperature=0.5)),
        (1, sft(hf, max_tokens_per_gpu=40)),
        (2, sft(hf, max_tokens_per_gpu=40, actor_num_gpus_per_node=2)),
        (2, sft(hf, tensor_model_parallel_size=2, actor_num_gpus_per_node=2)),
    )
    for world_size, args in layouts:
        for found in workers.run(world_size, losses, args, batch):
            assert found["loss"] == pytest.approx(loss, rel=1e-5)
            assert found["loss_per_sample"] == pytest.approx(per_sample, rel=1e-5)
            assert found["num_examples"] == NUM_ROWS
    for wrong in (by_huggingface(batch, shift=1), (per_sample, loss)):
        assert wrong[0] != pytest.approx(loss, rel=1e-3), "control: another mask, another mean"


def test_fewer_examples_than_ranks(workers: WorkerPool, hf: Path) -> None:
    batch = make_batch(2, num_rows=1)
    loss, _ = by_huggingface(batch)
    for found in workers.run(2, losses, sft(hf, actor_num_gpus_per_node=2), batch):
        assert found["loss"] == found["loss_per_sample"] == pytest.approx(loss, rel=1e-5)


def train_and_validate(
    rank: int, world_size: int, init_method: str, args: Args, batches: list[TrainBatch], examples: TrainBatch | None
) -> tuple[list[dict[str, float]], runs.Arrays, list[np.ndarray]]:
    """Train on each batch, with an evaluation before and after each one; return metrics, weights, and RNG states."""
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        metrics: list[dict[str, float]] = []
        for number, batch in enumerate(batches):
            if examples is not None:
                trainer.log_probs(examples)
            metrics.append(trainer.train(number, batch))
            if examples is not None:
                trainer.log_probs(examples)
        state = trainer.optimizer.state_dict()
        moments = [tensor.numpy().copy() for tensor in _tensors(state)]
        return metrics, runs.weights(trainer), [*moments, torch.get_rng_state().numpy(), _numpy_state()]
    finally:
        trainer.close()


def _tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state.detach().float().cpu()]
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [tensor for child in children for tensor in _tensors(child)]


def _numpy_state() -> np.ndarray:
    state: Any = np.random.get_state()
    return np.asarray(state[1])


def test_validation_changes_nothing_of_training(workers: WorkerPool, hf: Path) -> None:
    batches = [make_batch(seed) for seed in (3, 4)]
    args = replace(sft(hf), lr=1e-2)
    [with_it] = workers.run(1, train_and_validate, args, batches, make_batch(5))
    [without] = workers.run(1, train_and_validate, args, batches, None)
    assert runs.difference(with_it[1], without[1]) == 0.0
    assert len(with_it[2]) > 2 and all(map(np.array_equal, with_it[2], without[2]))
    for found, expected in zip(with_it[0], without[0], strict=True):
        for name in ("train/loss", "train/grad_norm", "train/lr"):
            assert found[name] == expected[name]
    [other] = workers.run(1, train_and_validate, args, batches[:1], None)
    assert runs.difference(other[1], without[1]) > 0, "control: a further step is noticed"
    assert not all(map(np.array_equal, other[2], without[2])), "control: the optimizer's state changes"


def test_means_over_tokens_and_over_examples() -> None:
    batch = make_batch(0, num_rows=2)
    columns = batch.columns | {
        "tokens": np.arange(8),
        "loss_mask": np.asarray([1, 0, 1, 1, 1], dtype=np.float32),
    }
    batch = TrainBatch(np.asarray([3, 5]), np.asarray([2, 3]), columns)
    log_probs_R = np.asarray([-4, -np.inf, 0, 0, 0], dtype=np.float32)
    found = validation_losses(Share.alone(batch), log_probs_R)
    assert found == {"loss": 1.0, "loss_per_sample": 2.0, "num_examples": 2.0, "trained_tokens": 4.0}
