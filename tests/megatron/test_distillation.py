"""On-policy distillation through the trainer: the student approaches its teacher, and starts from its own weights."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import tiny
import torch
from runs import Arrays, weights
from worker_pool import WorkerPool

from slime.algo import advantages
from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.megatron.trainer import Trainer

pytestmark = pytest.mark.dist

STEPS = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the student's directory and the teacher's."""
    root = tmp_path_factory.mktemp("models")
    return tiny.hf_dir(root / "student", "qwen2"), tiny.hf_dir(root / "teacher", "qwen2", seed=1)


def sampled(student: Path, seed: int) -> TrainBatch:
    """Let the student sample 32 responses of 12 tokens, each after one prompt token; rewards mean nothing."""
    model = tiny.hf_model("qwen2").eval()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, tiny.VOCAB, (32, 1), generator=generator)
    with torch.no_grad():
        for _ in range(12):
            chances = (model(tokens).logits[:, -1] / 0.8).softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], 1)
    columns = {
        "tokens": tokens.flatten().numpy(),
        "loss_mask": np.ones(32 * 12, dtype=np.float32),
        "rewards": np.zeros(32, dtype=np.float32),
        "group_indices": np.arange(32),
        "sample_indices": np.arange(32),
    }
    return TrainBatch(np.full(32, 13), np.full(32, 12), columns)


def _taught(
    rank: int, world_size: int, init_method: str, args: Args, batch: TrainBatch, swapped: bool
) -> tuple[list[dict[str, float]], Arrays, bool]:
    """Return metrics of several steps on one batch, the weights after them, and whether the student began correctly.

    `swapped` is a bug: the sign.
    """
    right = advantages.ESTIMATORS["on_policy_distillation"]
    wrong = {"on_policy_distillation": lambda rollout, options: -right(rollout, options)}
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        begun_apart = bool(np.abs(trainer.log_probs(batch) - trainer.log_probs(batch, model="ref")).max() > 0.1)
        with patch.dict(advantages.ESTIMATORS, wrong if swapped else {}):  # type: ignore[arg-type]
            metrics = [trainer.train(number, batch) for number in range(STEPS)]
        return metrics, weights(trainer), begun_apart
    finally:
        trainer.close()


def distance(student: Arrays | None, batch: TrainBatch) -> float:
    """Return KL(student || teacher) over the whole vocabulary, mean over response tokens; None: before any step."""
    model, teacher = tiny.hf_model("qwen2"), tiny.hf_model("qwen2", seed=1)
    if student is not None:
        model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in student.items()}, strict=False)
    tokens = torch.from_numpy(batch.columns["tokens"]).view(32, 13)
    with torch.no_grad():
        own, other = ((one(tokens[:, :-1]).logits / 0.8).log_softmax(-1) for one in (model, teacher))
    return float((own.exp() * (own - other)).sum(-1).mean())


def test_the_student_approaches_its_teacher(workers: WorkerPool, models: tuple[Path, Path]) -> None:
    """Train on one rank and on two; the opposite sign leads away from the teacher."""
    student, teacher = models
    batch = sampled(student, 0)
    before = distance(None, batch)

    def after(swapped: bool = False, ranks: int = 1) -> float:
        args = tiny.make_args(
            student,
            ref_load=str(teacher),
            advantage_estimator="on_policy_distillation",
            lr=1e-3,
            tensor_model_parallel_size=ranks,
        )
        _, trained, begun_apart = workers.run(ranks, _taught, args, batch, swapped)[0]
        assert begun_apart, "the student starts from --hf-checkpoint, not from the teacher"
        return distance(trained, batch)

    found = after()
    assert found < 0.9 * before, (before, found)
    assert after(ranks=2) == pytest.approx(found, rel=1e-3)
    away = after(swapped=True)
    assert away > 1.05 * before, (before, away)
    print("reverse KL", before, "->", found, "; with the opposite sign ->", away)


def test_the_teacher_distance_covers_counted_tokens_only(workers: WorkerPool, models: tuple[Path, Path]) -> None:
    student, teacher = models
    batch = tiny.random_batch(8, with_rollout=False)
    args = tiny.make_args(student, ref_load=str(teacher), advantage_estimator="on_policy_distillation", lr=0.0)
    metrics, _, _ = workers.run(1, _taught, args, batch, False)[0]
    gaps: list[float] = []
    rows = [tiny.hf_model("qwen2", seed=seed).double() for seed in (0, 1)]
    for tokens, mask, reward in zip(
        batch.rows("tokens"), batch.rows("loss_mask"), batch.columns["rewards"], strict=True
    ):
        ids = torch.from_numpy(tokens)
        with torch.no_grad():
            both = [(model(ids[None]).logits[0] / args.rollout_temperature).log_softmax(-1) for model in rows]
        chosen = [found[:-1].gather(1, ids[1:, None])[-len(mask) :, 0] for found in both]
        if not np.isnan(reward):
            gaps += (chosen[0] - chosen[1])[torch.from_numpy(mask > 0)].tolist()
    assert metrics[0]["train/teacher_kl"] == pytest.approx(float(np.mean(gaps)), rel=1e-4)
