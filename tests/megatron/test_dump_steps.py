"""--save-debug-train-data by a Trainer: its content, that it changes nothing, and what tools/diff_steps.py finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
from runs import difference
from safetensors.torch import load_file, save_file
from worker_pool import WorkerPool

from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.megatron.trainer import Trainer
from slime.observability.step_files import StepFiles
from tools.diff_steps import main

pytestmark = pytest.mark.dist

BATCH = tiny.random_batch()
TWO_STEPS: dict[str, Any] = {"num_steps_per_rollout": 2, "deterministic": True, "adam_eps": 1e-3, "clip_grad": 0.5}
"""The gradient norm is above 0.5, so a clipped dump would differ. Adam's usual epsilon turns rounding into steps."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "DP2, distributed optimizer": (2, {"use_distributed_optimizer": True, "balance_data": True}),
    "CP2, distributed optimizer": (
        2,
        {"context_parallel_size": 2, "use_distributed_optimizer": True, "max_tokens_per_gpu": 40},
    ),
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_dir(tmp_path_factory.mktemp("hf"), "glm4")


@pytest.fixture(scope="module")
def dumped(hf: Path, workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, runs.Outcome]:
    """Return the dump of one rank with two steps per rollout, and the run's own outcome."""
    path = tmp_path_factory.mktemp("dumps") / "one"
    return path, _train(workers, path, hf)


def _train(
    workers: WorkerPool, path: Path, hf: Path, batch: TrainBatch = BATCH, ranks: int = 1, **flags: Any
) -> runs.Outcome:
    args = tiny.make_args(hf, **{**TWO_STEPS, **flags}, save_debug_train_data=str(path))
    return workers.run(ranks, runs.train, args, [batch])[0]


def _diff(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str]:
    capsys.readouterr()
    code = main([str(word) for word in argv])
    return code, "".join(capsys.readouterr())


def _tensors(path: Path, place: str, kind: str = "") -> dict[str, np.ndarray]:
    files = StepFiles(path)
    [found] = [each for each in files.places if each.name == place]
    return {
        entry.name.removeprefix(kind): files.tensor(entry).numpy()
        for entry in found.tensors
        if entry.name.startswith(kind)
    }


def test_the_dump_holds_every_training_tensor(dumped: tuple[Path, runs.Outcome], workers: WorkerPool, hf: Path) -> None:
    path, outcome = dumped
    assert [place.name for place in StepFiles(path).places] == ["rollout 0", "rollout 0, step 0", "rollout 0, step 1"]
    assert not list(path.glob(".tmp*"))
    columns = _tensors(path, "rollout 0")
    came = ["tokens", "loss_mask", "rewards", "group_indices", "sample_indices", "rollout_log_probs"]
    assert list(columns)[2:] == [*came, "old_log_probs", "advantages", "loss_weights"]
    for name, values in BATCH.columns.items():
        np.testing.assert_array_equal(columns[name], values)
    steps = [_tensors(path, f"rollout 0, step {number}") for number in range(2)]
    assert list(steps[0])[:4] == ["places", "log_probs", "token_loss", "loss"]
    names = [name for name in steps[0] if name.startswith("gradient ")]
    assert (names[0], names[-1]) == ("gradient lm_head.weight", "gradient model.embed_tokens.weight")
    assert names[2].startswith("gradient model.layers.1."), "as the backward pass goes"
    places = np.concatenate([step["places"] for step in steps])
    np.testing.assert_array_equal(places, np.arange(len(columns["advantages"])))
    np.testing.assert_array_equal(steps[0]["log_probs"], columns["old_log_probs"][steps[0]["places"]])
    for number, metric in enumerate(("loss", "gradient_norm")):
        mean = np.mean([step[metric] for step in steps])
        assert outcome.metrics[0][f"train/{('loss', 'grad_norm')[number]}"] == pytest.approx(mean, rel=1e-12)
    weights, gradients = (_tensors(path, "rollout 0, step 1", kind) for kind in ("weight ", "gradient "))
    assert difference(weights, outcome.weights) == 0
    norm = np.sqrt(sum(np.square(gradient.astype(np.float64)).sum() for gradient in gradients.values()))
    assert norm == pytest.approx(float(steps[1]["gradient_norm"]), rel=1e-5)
    assert norm > 2 * TWO_STEPS["clip_grad"]
    [unclipped] = workers.run(1, runs.train, tiny.make_args(hf, clip_grad=0.0, adam_eps=1e-3), [BATCH.select(range(4))])
    first = _tensors(path, "rollout 0, step 0", "gradient ")
    assert difference(first, unclipped.gradients) < 1e-5
    assert difference(gradients, unclipped.gradients) > 1e-2  # control


def test_replays_are_bit_identical_with_and_without_dump(
    dumped: tuple[Path, runs.Outcome], workers: WorkerPool, hf: Path, tmp_path: Path, capsys: Any
) -> None:
    path, outcome = dumped
    again = _train(workers, tmp_path / "again", hf)
    code, text = _diff(capsys, path, tmp_path / "again")
    assert code == 0 and "equal bit for bit" in text, text
    [without] = workers.run(1, runs.train, tiny.make_args(hf, **TWO_STEPS), [BATCH])
    for other in (again, without):
        assert difference(other.weights, outcome.weights) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_agrees(
    layout: str, dumped: tuple[Path, runs.Outcome], workers: WorkerPool, hf: Path, tmp_path: Path, capsys: Any
) -> None:
    path, _ = dumped
    ranks, flags = LAYOUTS[layout]
    outcome = _train(workers, tmp_path / "other", hf, ranks=ranks, **flags)
    code, text = _diff(capsys, path, tmp_path / "other", "--rtol", "1e-5", "--all")
    assert code == 0, text
    assert f"ranks: 1 in A, {ranks} in B" in text
    assert _diff(capsys, path, tmp_path / "other")[0] == 1, "control: sums in another order are not the same bits"
    [without] = workers.run(ranks, runs.train, tiny.make_args(hf, **TWO_STEPS, **flags), [BATCH])[:1]
    assert difference(outcome.weights, without.weights) == 0, "the dump changes nothing"


def test_experts_of_all_ranks(workers: WorkerPool, tmp_path: Path, capsys: Any) -> None:
    mixture = tiny.hf_dir(tmp_path / "hf", "qwen3_moe")
    _train(workers, tmp_path / "one", mixture)
    flags = {"expert_model_parallel_size": 2, "use_distributed_optimizer": True}
    _train(workers, tmp_path / "two", mixture, ranks=2, **flags)
    code, text = _diff(capsys, tmp_path / "one", tmp_path / "two", "--rtol", "1e-5", "--all")
    assert code == 0 and "gradient model.layers.2.mlp.experts.7.down_proj.weight" in text, text


def test_critic_steps_are_dumped(workers: WorkerPool, hf: Path, tmp_path: Path, capsys: Any) -> None:
    ppo = {"advantage_estimator": "ppo", "critic_lr": 1e-2, "num_steps_per_rollout": 1}
    _train(workers, tmp_path / "one", hf, **ppo)
    _train(workers, tmp_path / "two", hf, ranks=2, pipeline_model_parallel_size=2, **ppo)
    names = ["rollout 0", "rollout 0, step 0", "rollout 0, step 0, critic"]
    assert [place.name for place in StepFiles(tmp_path / "one").places] == names
    assert {"values", "returns"} <= _tensors(tmp_path / "one", names[0]).keys()
    critic = _tensors(tmp_path / "one", names[2])
    assert {"values", "gradient value_head.weight", "weight value_head.weight"} <= critic.keys()
    assert critic["gradient value_head.weight"].any()
    code, text = _diff(capsys, tmp_path / "one", tmp_path / "two", "--rtol", "1e-5", "--all")
    assert code == 0, text
    _train(workers, tmp_path / "faster", hf, **{**ppo, "critic_lr": 2e-2})
    code, text = _diff(capsys, tmp_path / "one", tmp_path / "faster")
    assert code == 1 and "tensors: rollout 0, step 0, critic: weight model.embed_tokens.weight" in text, text


def test_a_changed_reward_is_named(
    dumped: tuple[Path, Any], workers: WorkerPool, hf: Path, tmp_path: Path, capsys: Any
) -> None:
    rewards = BATCH.columns["rewards"].copy()
    rewards[5] += 0.25
    _train(workers, tmp_path / "other", hf, BATCH.with_column("rewards", rewards))
    code, text = _diff(capsys, dumped[0], tmp_path / "other")
    assert code == 1
    assert "tensors: rollout 0: rewards\n  sample 5 of group 1: " in text, text


def test_a_changed_initial_weight_shows_at_first_forward(
    dumped: tuple[Path, Any], workers: WorkerPool, hf: Path, tmp_path: Path, capsys: Any
) -> None:
    other = tiny.hf_dir(tmp_path / "hf", "glm4")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][3] += 0.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    _train(workers, tmp_path / "other", other)
    code, text = _diff(capsys, dumped[0], tmp_path / "other")
    assert code == 1 and "tensors: rollout 0: old_log_probs\n  sample 0 of group 0, response token 0 of " in text, text
    _train(workers, tmp_path / "single", hf, num_steps_per_rollout=1)
    _train(workers, tmp_path / "other single", other, num_steps_per_rollout=1)
    code, text = _diff(capsys, tmp_path / "single", tmp_path / "other single")
    assert code == 1 and "tensors: rollout 0, step 0: log_probs\n  sample 0 of group 0, response" in text, text


def test_a_learning_rate_shows_in_the_updated_weights(
    dumped: tuple[Path, Any], workers: WorkerPool, hf: Path, tmp_path: Path, capsys: Any
) -> None:
    _train(workers, tmp_path / "other", hf, lr=2e-3)
    code, text = _diff(capsys, dumped[0], tmp_path / "other")
    assert code == 1
    assert "tensors: rollout 0, step 0: weight model.embed_tokens.weight\n  entry [" in text, text


def test_dumps_that_cannot_be_compared(
    dumped: tuple[Path, Any], workers: WorkerPool, hf: Path, tmp_path: Path, capsys: Any
) -> None:
    order = [1, 0, *range(2, 8)]
    _train(workers, tmp_path / "order", hf, BATCH.select(order))
    _train(workers, tmp_path / "steps", hf, num_steps_per_rollout=4)
    code, text = _diff(capsys, dumped[0], tmp_path / "order")
    assert code == 2 and "rollout 0: the same samples in another order: row 0 is sample 0 of group 0 in A" in text, text
    code, text = _diff(capsys, dumped[0], tmp_path / "steps")
    assert code == 2 and "A's steps are rollout 0, step 0, rollout 0, step 1; B's are rollout 0, step 0, " in text, text


def _three_rollouts(rank: int, world_size: int, init_method: str, args: Args) -> None:
    """Train on the second rollout twice, like a run that starts again from its checkpoint."""
    for rollouts in ((0, 1), (1,)):
        trainer = Trainer(args, rank=rank, world_size=world_size, init_method=f"{init_method}-{rollouts[0]}")
        try:
            trainer.load()
            for number in rollouts:
                trainer.train(number, BATCH)
        finally:
            trainer.close()


def test_a_rollout_trained_twice_replaces_its_dump(workers: WorkerPool, hf: Path, tmp_path: Path) -> None:
    args = replace(tiny.make_args(hf), save_debug_train_data=str(tmp_path / "dump"))
    workers.run(1, _three_rollouts, args)
    names = [place.name for place in StepFiles(tmp_path / "dump").places]
    assert names == ["rollout 0", "rollout 0, step 0", "rollout 1", "rollout 1, step 0"]
    first, second = (_tensors(tmp_path / "dump", f"rollout {number}, step 0")["log_probs"] for number in (0, 1))
    np.testing.assert_array_equal(first, second, "the second start is from the same weights")


def _bad_step(rank: int, world_size: int, init_method: str, args: Args) -> str:
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        with torch.no_grad():
            next(trainer.model[0].parameters()).fill_(torch.nan)
        with pytest.raises(RuntimeError) as raised:
            trainer.train(0, BATCH)
        return str(raised.value)
    finally:
        trainer.close()


def test_a_refused_step_is_in_the_dump(workers: WorkerPool, hf: Path, tmp_path: Path, capsys: Any) -> None:
    args = replace(tiny.make_args(hf), save_debug_train_data=str(tmp_path / "dump"))
    [message] = workers.run(1, _bad_step, args)
    assert "not finite" in message
    assert np.isnan(_tensors(tmp_path / "dump", "rollout 0, step 0")["log_probs"]).all()
    assert _diff(capsys, tmp_path / "dump", tmp_path / "dump")[0] == 0, "a nan is the same as itself"
