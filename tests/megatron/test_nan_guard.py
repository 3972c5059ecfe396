"""The guard: values that are not finite and spikes, on one rank and on two, name samples and change no weight."""

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
from worker_pool import WorkerPool

from slime.algo.losses import LossInputs, LossOptions
from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.megatron.nan_guard import FEWEST_STEPS, MOST_SKIPPED, check_columns
from slime.megatron.optim.optimizer_state import parts_of
from slime.megatron.share import Share
from slime.megatron.trainer import Trainer

pytestmark = pytest.mark.dist

POISONED = 5
"""The row of the sample that is broken; its sample_index is 105, in group 1."""


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_dir(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_dir(tmp_path_factory.mktemp("mixture"), "glm4_moe")


def batch_of(num_samples: int = 8) -> TrainBatch:
    batch = tiny.random_batch(num_samples)
    batch = batch.with_column("loss_mask", np.ones_like(batch.columns["loss_mask"]))
    return batch.with_column("sample_indices", 100 + np.arange(num_samples))


def first_token(batch: TrainBatch, row: int) -> int:
    return int(batch.response_lengths_N[:row].sum())


def spoilt(batch: TrainBatch, name: str, value: float, token: int = 2) -> TrainBatch:
    values = batch.columns[name].copy()
    values[POISONED if len(values) == len(batch) else first_token(batch, POISONED) + token] = value
    return batch.with_column(name, values)


# --- columns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("rewards", np.inf, "rewards that are not finite: sample 105 of group 1 (inf)"),
        ("rollout_log_probs", -np.inf, "sample 105 of group 1 (1 of LENGTH response tokens, the first is 2: -inf)"),
        ("ref_log_probs", np.nan, "sample 105 of group 1 (1 of LENGTH response tokens, the first is 2: nan)"),
        ("advantages", np.nan, "sample 105 of group 1 (1 of LENGTH response tokens, the first is 2: nan)"),
    ],
)
def test_columns_that_are_not_finite(name: str, value: float, expected: str) -> None:
    batch = batch_of()
    for column in ("ref_log_probs", "advantages"):
        batch = batch.with_column(column, batch.columns["rollout_log_probs"])
    counted_N = np.ones(len(batch), dtype=bool)
    check_columns("rollout 3", Share.alone(batch), batch.columns, counted_N)  # control
    wrong = spoilt(batch, name, value)
    with pytest.raises(RuntimeError) as raised:
        check_columns("rollout 3", Share.alone(wrong), wrong.columns, counted_N)
    message = str(raised.value)
    assert message.startswith(f"rollout 3: {name} ")
    assert expected.replace("LENGTH", str(batch.response_lengths_N[POISONED])) in message
    counted_N[POISONED] = False  # a sample that does not count may hold anything
    check_columns("rollout 3", Share.alone(wrong), wrong.columns, counted_N)
    if name != "rewards":
        mask = np.isfinite(wrong.columns[name]).astype(np.float32)
        every_N = np.ones(len(batch), dtype=bool)
        check_columns("rollout 3", Share.alone(wrong), wrong.columns | {"loss_mask": mask}, every_N)


# --- steps ------------------------------------------------------------------------------------------------------


def marked(inputs: LossInputs, options: LossOptions) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Likelihood, times the mark that the test put into the engine's log-probs: 1e38 is too large for a product."""
    assert inputs.rollout_log_probs_R is not None
    return -inputs.log_probs_R * inputs.rollout_log_probs_R * inputs.rollout_log_probs_R.abs(), {}


CUSTOM: dict[str, Any] = {"loss_type": "custom_loss", "custom_loss_function_path": "test_nan_guard.marked"}


def marks(batch: TrainBatch, value: float | None = None) -> TrainBatch:
    batch = batch.with_column("rollout_log_probs", np.ones_like(batch.columns["rollout_log_probs"]))
    return batch if value is None else spoilt(batch, "rollout_log_probs", value)


def attempts(
    rank: int, world_size: int, init_method: str, args: Args, batches: list[TrainBatch], save_at: int | None
) -> tuple[list[dict[str, float] | str], list[bool]]:
    """Return, for each batch, the metrics or the error, and whether the weights are unchanged."""
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        found: list[dict[str, float] | str] = []
        kept: list[bool] = []
        for number, batch in enumerate(batches):
            if number == save_at:
                trainer.save(number - 1, {})
                again = replace(args, load=args.save)
                trainer.close()
                trainer = Trainer(again, rank=rank, world_size=world_size, init_method=f"{init_method}-again")
                trainer.load()
            before = runs.weights(trainer)
            try:
                found.append(trainer.train(number, batch))
            except RuntimeError as error:
                found.append(f"{type(error).__name__}: {error}")
            kept.append(difference(runs.weights(trainer), before) == 0)
        return found, kept
    finally:
        trainer.close()


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp": (2, {}),
    "pp": (2, {"pipeline_model_parallel_size": 2}),
    "tp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "cp": (2, {"context_parallel_size": 2, "use_distributed_optimizer": True}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_that_is_not_finite(layout: str, workers: WorkerPool, hf: Path) -> None:
    """Every rank raises the same error, although only one may hold the sample; the next rollout is trained on."""
    ranks, flags = LAYOUTS[layout]
    good, bad = marks(batch_of()), marks(batch_of(), 1e38)
    outcomes = workers.run(ranks, attempts, tiny.make_args(hf, **CUSTOM, **flags), [bad, good], None)
    for [error, metrics], [kept, unchanged] in outcomes:
        assert error == outcomes[0][0][0] and kept and not unchanged
        assert isinstance(error, str) and error.startswith("BadStepError: rollout 0, step 0: the loss is inf")
        length = good.response_lengths_N[POISONED]
        assert (
            f"Not finite in sample 105 of group 1 (1 of {length} response tokens, the first is 2: log-prob -" in error
        )
        assert ", loss inf, advantage " in error and "--bad-step-action skip" in error
        assert isinstance(metrics, dict) and np.isfinite(metrics["train/loss"])


def test_skipped_steps(workers: WorkerPool, hf: Path) -> None:
    """The other steps are taken; too many consecutive skips end the run."""
    args = tiny.make_args(hf, **CUSTOM, bad_step_action="skip", num_steps_per_rollout=2)
    good, bad = marks(batch_of()), marks(batch_of(), 1e38)
    both = TrainBatch(
        bad.total_lengths_N,
        bad.response_lengths_N,
        dict(bad.columns) | {"rollout_log_probs": np.full_like(bad.columns["rollout_log_probs"], 1e38)},
    )
    [(found, kept)] = workers.run(1, attempts, args, [bad, good, *[both] * (MOST_SKIPPED // 2), both], None)
    skipped = [metrics["train/skipped_steps"] for metrics in found if isinstance(metrics, dict)]
    assert skipped == [1, 0, *[2] * (MOST_SKIPPED // 2)]
    assert kept == [False, False, *[True] * (len(found) - 2)]
    first, last = found[0], found[-1]
    assert isinstance(first, dict) and np.isfinite(first["train/loss"])
    assert isinstance(last, str) and f"the {MOST_SKIPPED} steps before it were skipped already" in last


MOVES_BIASES: dict[str, Any] = {
    "moe_router_bias_update_rate": 0.25,
    "moe_aux_loss_coeff": 0.1,
    "bad_step_action": "skip",
    "lr_decay_style": "linear",
    "min_lr": 0.0,
}


def state_of(trainer: Trainer) -> dict[str, bytes]:
    """Return every bit that a step changes: model with all buffers, optimizer with its settings, schedule."""
    found: dict[str, Any] = {}
    for number, chunk in enumerate(trainer.model):
        found |= {f"model {number} {name}": tensor for name, tensor in chunk.named_parameters()}
        found |= {f"model {number} {name}": tensor for name, tensor in chunk.named_buffers()}
    for number, part in enumerate(parts_of(trainer.optimizer)):
        for place, state in enumerate(part.optimizer.state.values()):
            found |= {f"optimizer {number} {place} {name}": value for name, value in state.items()}
        for place, group in enumerate(part.optimizer.param_groups):
            found |= {f"group {number} {place} {name}": value for name, value in group.items() if name != "params"}
    found |= {f"schedule {name}": value for name, value in trainer.scheduler.state_dict().items()}
    return {
        name: value.detach().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
        for name, value in found.items()
    }


def states(
    rank: int, world_size: int, init_method: str, args: Args, batches: list[TrainBatch]
) -> list[tuple[float, dict[str, bytes]]]:
    """Return, after each batch as a rollout of its own, the number of skipped steps and the state."""
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        return [
            (trainer.train(number, batch)["train/skipped_steps"], state_of(trainer))
            for number, batch in enumerate(batches)
        ]
    finally:
        trainer.close()


@pytest.mark.parametrize(
    "flags",
    [{}, {"expert_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1}],
    ids=["one", "one of two ranks has the bad sample", "two stages"],
)
def test_a_skipped_step_changes_no_state(flags: dict[str, Any], workers: WorkerPool, mixture: Path) -> None:
    """Router biases do not move either, and the step after it equals that of a run without the skipped step."""
    args = tiny.make_args(mixture, **CUSTOM, **MOVES_BIASES, **flags)
    first, bad, last = marks(batch_of()), marks(batch_of(), 1e38), marks(tiny.random_batch(seed=1))
    ranks = 2 if flags else 1
    with_it = workers.run(ranks, states, args, [first, bad, last])
    without = workers.run(ranks, states, args, [first, last])
    for ours, theirs in zip(with_it, without, strict=True):
        assert [skipped for skipped, _ in ours] == [0, 1, 0]
        (_, before), (_, after), (_, end) = ours
        assert [name for name in before if after[name] != before[name]] == []
        assert [name for name in end if end[name] != theirs[-1][1][name]] == []
        moved = {name for name in end if end[name] != before[name]}  # control: a step that is taken moves all kinds
        for kind in (".expert_bias", "linear_qkv.weight", "exp_avg", "schedule num_steps", " lr"):
            assert any(name.endswith(kind) for name in moved), kind
        assert not any(name.endswith("local_tokens_per_expert") for name in moved)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_spike(ranks: int, workers: WorkerPool, hf: Path, tmp_path: Path) -> None:
    """The history belongs to the run, also after a resume; without the flag, or below the factor, the step is taken."""
    flags = {"check_for_spiky_loss": True, "spiky_loss_factor": 4.0, "lr": 1e-6, "num_rollout": 20}
    args = tiny.make_args(hf, **CUSTOM, **flags, save=str(tmp_path))
    good, below, bad = marks(batch_of()), marks(batch_of(), 4.0), marks(batch_of(), 400.0)
    batches = [*[good] * (FEWEST_STEPS - 1), below, bad]
    outcomes = workers.run(ranks, attempts, args, batches, FEWEST_STEPS - 2)
    for found, kept in outcomes:
        assert kept == [*[False] * FEWEST_STEPS, True]
        error = found[-1]
        assert isinstance(error, str) and "the mean of |loss| over tokens is " in error
        assert f"more than 4 times the largest of the last {FEWEST_STEPS} steps" in error
        assert "The largest shares of |loss|: sample 105 of group 1 (100%)" in error
        assert error == outcomes[0][0][-1]
    if ranks == 1:  # control
        args = replace(args, check_for_spiky_loss=False, save=None)
        assert workers.run(1, attempts, args, [*[good] * FEWEST_STEPS, bad], None)[0][1] == [False] * (FEWEST_STEPS + 1)
