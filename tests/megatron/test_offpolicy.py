"""Off-policy tokens: which tokens they are, and that training weights exactly these by the formula."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
from runs import difference
from worker_pool import WorkerPool

from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.megatron.advantages import counted_rows_of
from slime.megatron.offpolicy import offpolicy_columns
from slime.megatron.offpolicy import version_of_weights as version_of_share
from slime.megatron.share import Share
from slime.megatron.trainer import Trainer

VERSION = 5


def random_versions(batch: TrainBatch, *, seed: int = 0) -> np.ndarray:
    """Mark the second half of the samples and the beginnings of the first two as made by older weights."""
    generator = np.random.default_rng(seed)
    rows = []
    for row, length in enumerate(batch.response_lengths_N.tolist()):
        versions = np.full(length, VERSION if row < len(batch) // 2 else VERSION - 1 - row % 2)
        if row < 2:
            versions[: generator.integers(1, length)] = VERSION - 1 - row
        rows.append(versions)
    return np.concatenate(rows)


def plain_batch(**columns: np.ndarray) -> TrainBatch:
    batch = tiny.random_batch()
    batch = batch.with_column("policy_versions", random_versions(batch))
    for name, values in columns.items():
        batch = batch.with_column(name, values)
    return batch


def prepared(args: Args, batch: TrainBatch, version: int = VERSION) -> tuple[TrainBatch, dict[str, float]]:
    made, metrics = offpolicy_columns(args, Share.alone(batch), counted_rows_of(args, batch), version)
    return replace(batch, columns=batch.columns | made), metrics


def version_of_weights(args: Args, rollout_id: int, batch: TrainBatch, policy_version: int | None) -> int:
    return version_of_share(args, rollout_id, Share.alone(batch), policy_version)


# --- which tokens -----------------------------------------------------------------------------------------------


def test_counted_tokens_of_older_weights_are_weighted() -> None:
    rewards = tiny.random_batch().columns["rewards"].copy()
    rewards[7] = np.nan
    batch = plain_batch(rewards=rewards)
    found, metrics = prepared(Args(), batch)
    age = VERSION - batch.columns["policy_versions"]
    counts = batch.columns["loss_mask"] * np.repeat(~np.isnan(rewards), batch.response_lengths_N) > 0
    assert np.array_equal(found.columns["weighted"], (age > 0) & counts)
    assert np.array_equal(found.columns["offpolicy"], (age > 0) & (batch.columns["loss_mask"] > 0))
    assert not np.array_equal(found.columns["offpolicy"], found.columns["weighted"]), "the sample without a reward"
    assert metrics == {
        "train/offpolicy_tokens": pytest.approx((age > 0)[counts].mean()),
        "train/staleness": pytest.approx(age[counts].mean()),
        "train/staleness_max": 2.0,
    }
    everything, _ = prepared(Args(use_tis=True), batch)
    assert np.array_equal(everything.columns["weighted"], counts), "not those that do not count"
    none, metrics = prepared(Args(offpolicy_correction="none"), batch)
    assert not none.has("weighted") and none.has("offpolicy") and metrics["train/staleness_max"] == 2


def test_a_batch_of_current_weights_is_unchanged() -> None:
    batch = plain_batch(policy_versions=np.full_like(random_versions(tiny.random_batch()), VERSION))
    found, metrics = prepared(Args(), batch)
    assert found.columns.keys() == batch.columns.keys()
    assert metrics == {"train/offpolicy_tokens": 0.0, "train/staleness": 0.0, "train/staleness_max": 0.0}
    without = tiny.random_batch()
    assert prepared(Args(), without) == (without, {})
    assert prepared(Args(loss_type="sft_loss", use_tis=True), plain_batch())[1] == {}


def test_masked_instead_of_weighted() -> None:
    batch = plain_batch()
    found, metrics = prepared(Args(partial_rollout=True, mask_offpolicy_in_partial_rollout=True), batch)
    older = batch.columns["policy_versions"] < VERSION
    assert not found.columns["loss_mask"][older].any() and not found.has("weighted") and not found.has("offpolicy")
    assert np.array_equal(found.columns["loss_mask"][~older], batch.columns["loss_mask"][~older])
    assert metrics["train/offpolicy_tokens"] > 0.4


def test_tokens_that_cannot_be_corrected_are_an_error() -> None:
    batch = plain_batch()
    blind = TrainBatch(
        batch.total_lengths_N,
        batch.response_lengths_N,
        {name: values for name, values in batch.columns.items() if name != "rollout_log_probs"},
    )
    with pytest.raises(ValueError, match=r"--offpolicy-correction tis.* no rollout_log_probs"):
        prepared(Args(), blind)
    assert prepared(Args(offpolicy_correction="none"), blind)[1]["train/offpolicy_tokens"] > 0
    masked = blind.with_column("loss_mask", blind.columns["policy_versions"] == VERSION)
    assert not prepared(Args(), masked)[0].has("weighted"), "no token that counts needs them"
    with pytest.raises(ValueError, match="--use-tis"):
        prepared(Args(use_tis=True), masked)
    for flags in ({"partial_rollout": True}, {"rollouts_ahead": 1}):
        with pytest.raises(ValueError, match="no sample has policy_versions"):
            prepared(Args(**flags), tiny.random_batch())
        assert prepared(Args(**flags, offpolicy_correction="none"), tiny.random_batch())[1] == {}


def test_versions_of_a_run_and_of_a_replay() -> None:
    batch, partial = plain_batch(), Args(partial_rollout=True)
    assert version_of_weights(partial, 4, batch, 5) == 5
    assert version_of_weights(Args(rollouts_ahead=1), 4, batch, 6) == 6
    assert version_of_weights(partial, 4, tiny.random_batch(), 6) == 6
    with pytest.raises(ValueError, match="policy version 5, and the trainer's weights are version 4"):
        version_of_weights(partial, 4, batch, 4)
    tools = batch.with_column("loss_mask", batch.columns["policy_versions"] < VERSION)
    assert version_of_weights(partial, 4, tools, 4) == 4, "what does not count has no version"
    with pytest.raises(RuntimeError, match="version 3, and the trainer's weights are version 5, in a synchronous run"):
        version_of_weights(Args(), 4, batch, 5)
    current = batch.with_column("loss_mask", batch.columns["policy_versions"] == VERSION)
    assert version_of_weights(Args(), 4, current, 5) == 5
    assert version_of_weights(Args(rollout_function_path="own.function"), 4, batch, 5) == 5
    replay = Args(load_debug_rollout_data="x")
    assert version_of_weights(replay, 4, batch, None) == 5, "as in the run that dumped it"
    assert version_of_weights(replay, 5, batch, None) == 6, "as in a run that generates one ahead"
    assert version_of_weights(replay, 0, batch, 1) == version_of_weights(replay, 0, batch, None) == 5, "another run's"


# --- training ---------------------------------------------------------------------------------------------------

LOW, HIGH = 0.6, 1.5


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_dir(tmp_path_factory.mktemp("model"), "glm4")


def older_model() -> torch.nn.Module:
    """Return the trained model as it was some steps before."""
    model = tiny.hf_model("glm4")
    with torch.no_grad():
        for parameter, noise in zip(model.parameters(), tiny.hf_model("glm4", seed=1).parameters(), strict=True):
            if parameter.dim() > 1:
                parameter.add_(noise, alpha=0.1)
    return model


def response_log_probs(model: torch.nn.Module, batch: TrainBatch, temperature: float) -> torch.Tensor:
    rows = []
    for row, length in zip(batch.rows("tokens"), batch.response_lengths_N.tolist(), strict=True):
        tokens = torch.from_numpy(row)
        log_probs = (model(tokens[None]).logits[0] / temperature).log_softmax(-1)
        rows.append(log_probs[:-1].gather(1, tokens[1:, None])[-length:, 0])
    return torch.cat(rows)


def mixed_batch(temperature: float) -> TrainBatch:
    """Give each token its log-prob under the weights that made it; masked tokens get an unusable one."""
    batch = plain_batch()
    older = batch.columns["policy_versions"] < VERSION
    with torch.no_grad():
        then, now = (
            response_log_probs(model.double(), batch, temperature).numpy()
            for model in (older_model(), tiny.hf_model("glm4"))
        )
    sampled = np.where(batch.columns["loss_mask"] > 0, np.where(older, then, now), np.nan)
    return batch.with_column("rollout_log_probs", sampled)


@dataclass
class Expected:
    loss: float
    gradients: runs.Arrays
    weight: float
    """The importance weight: mean over samples of the mean over their tokens, as in the loss."""
    clipped: float


def by_the_formula(batch: TrainBatch, correction: str, temperature: float) -> Expected:
    """mean over samples of the mean over tokens of -A w p / p.detach(), in float64, from transformers' log-probs."""
    model = tiny.hf_model("glm4").double()
    lengths = batch.response_lengths_N.tolist()
    rewards, groups = batch.columns["rewards"].astype(np.float64), batch.columns["group_indices"]
    losses, weights, clipped = [], [], []
    for row, chosen in enumerate(response_log_probs(model, batch, temperature).split(lengths)):
        group = rewards[groups == groups[row]]
        advantage = (rewards[row] - group.mean()) / (group.std(ddof=1) + 1e-6)
        mask = batch.rows("loss_mask")[row] > 0
        older = batch.rows("policy_versions")[row] < VERSION
        if correction == "masked":
            mask = mask & ~older
            if not mask.any():
                continue
        older = older & mask
        weight = np.ones(len(mask))
        if correction in ("tis", "mis"):
            ratio = np.exp(chosen.detach().numpy() - batch.rows("rollout_log_probs")[row].astype(np.float64))
            bounded = np.clip(ratio, LOW, HIGH)
            weight = np.where(older, bounded if correction == "tis" else ratio * (ratio == bounded), 1.0)
            clipped.append((older & (ratio != bounded))[mask].mean())
        ratios = (chosen - chosen.detach()).exp()
        losses.append((-advantage * torch.from_numpy(weight) * ratios)[torch.from_numpy(mask)].mean())
        weights.append(weight[mask].mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return Expected(loss.item(), gradients, float(np.mean(weights)), float(np.mean(clipped or [0.0])))


def _train(
    rank: int, world_size: int, init_method: str, args: Args, batch: TrainBatch
) -> tuple[dict[str, float], runs.Arrays]:
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        return trainer.train(4, batch, VERSION), runs.gradients(trainer)
    finally:
        trainer.close()


def make_args(hf: Path, **flags: Any) -> Args:
    defaults = {"partial_rollout": True, "clip_grad": 0.0, "lr": 0.0, "tis_clip": HIGH, "tis_clip_low": LOW}
    return tiny.make_args(hf, **{**defaults, **flags})


CORRECTIONS: dict[str, dict[str, Any]] = {
    "tis": {},
    "mis": {"offpolicy_correction": "mis"},
    "none": {"offpolicy_correction": "none"},
    "masked": {"mask_offpolicy_in_partial_rollout": True},
}


@pytest.mark.dist
def test_training_on_older_tokens_follows_the_formula(workers: WorkerPool, hf: Path) -> None:
    args = make_args(hf)
    batch = mixed_batch(args.rollout_temperature)
    found = {name: workers.run(1, _train, make_args(hf, **flags), batch)[0] for name, flags in CORRECTIONS.items()}
    for name, (metrics, gradients) in found.items():
        expected = by_the_formula(batch, name, args.rollout_temperature)
        assert metrics["train/loss"] == pytest.approx(expected.loss, rel=1e-5, abs=1e-6), name
        assert difference(gradients, expected.gradients) < 1e-4, name
        assert metrics["train/offpolicy_tokens"] > 0.4 and metrics["train/staleness_max"] == 2
        if name in ("tis", "mis"):
            assert metrics["train/tis_weight"] == pytest.approx(expected.weight, rel=1e-5)
            assert metrics["train/tis_clipped"] == pytest.approx(expected.clipped, rel=1e-5)
            assert 0.1 < expected.clipped < 0.4
        # the gap covers tokens of the current weights only: the others' would raise a false alarm
        assert metrics["train/logprob_gap_max"] < 1e-4, name
    assert abs(found["tis"][0]["train/loss"] - found["none"][0]["train/loss"]) > 1e-3  # control
    for name, (_, gradients) in found.items():  # control: no correction passes for another
        for other, (_, other_gradients) in found.items():
            assert other == name or difference(gradients, other_gradients) > 0.05, (name, other)


@pytest.mark.dist
@pytest.mark.parametrize(
    "flags",
    [
        {"context_parallel_size": 2},
        {"pipeline_model_parallel_size": 2},
        {"num_steps_per_rollout": 2},
        {"use_tis": True},  # tokens of the current weights have an importance weight of 1
    ],
    ids=str,
)
def test_every_cut_gives_the_same_result(flags: dict[str, Any], workers: WorkerPool, hf: Path) -> None:
    args = make_args(hf, **flags)
    batch = mixed_batch(args.rollout_temperature)
    expected = by_the_formula(batch, "tis", args.rollout_temperature)
    for metrics, gradients in workers.run(2, _train, args, batch):
        assert metrics["train/loss"] == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
        assert metrics["train/tis_weight"] == pytest.approx(expected.weight, rel=1e-5)
        if args.num_steps_per_rollout == 1 and args.pipeline_model_parallel_size == 1:
            assert difference(gradients, expected.gradients) < 1e-4


@pytest.mark.dist
def test_older_weights_alone_give_no_logprob_gap(workers: WorkerPool, hf: Path) -> None:
    """This includes a sample without a reward, whose tokens do not count in the loss."""
    rewards = tiny.random_batch().columns["rewards"].copy()
    rewards[7] = np.nan
    versions = np.zeros(int(tiny.random_batch().response_lengths_N.sum()))
    masking = {"partial_rollout": True, "mask_offpolicy_in_partial_rollout": True}
    for flags in ({}, masking):
        [(metrics, _)] = workers.run(
            1, _train, make_args(hf, **flags), plain_batch(policy_versions=versions, rewards=rewards)
        )
        assert not any(name.startswith("train/logprob_gap") for name in metrics)
        assert metrics["train/offpolicy_tokens"] == 1 and metrics["train/staleness"] == VERSION
