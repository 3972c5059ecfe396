"""Algorithms through the trainer: their inputs are computed when flags need them, and responses stay whole.

Losses and gradients are compared with float64 formulas over transformers' log-probs, one sample after another.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import runs
import tiny
import torch
import torch.distributed as dist
from runs import Outcome, difference
from torch import Tensor
from worker_pool import WorkerPool

from slime.algo.sequences import Sequences
from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.megatron.microbatch import SharedSequences

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_dir(tmp_path_factory.mktemp("model"), "qwen2")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of the same architecture with other weights."""
    return tiny.hf_dir(tmp_path_factory.mktemp("reference"), "qwen2", seed=1)


def plain_batch() -> TrainBatch:
    """Make groups of 5, 2 and 1 samples, with a failed reward and an empty mask."""
    batch = tiny.random_batch(8, with_rollout=False)
    rewards = np.asarray([1, 0, 0.3, 1, np.nan, 0.8, 0.1, 0.5])
    mask = np.concatenate([row * (number != 3) for number, row in enumerate(batch.rows("loss_mask"))])
    batch = batch.with_column("rewards", rewards).with_column("loss_mask", mask)
    return batch.with_column("group_indices", np.asarray([0, 0, 0, 0, 0, 1, 1, 2]))


# --- one step by the formula ------------------------------------------------------------------------------------

GAMMA, BETA = 0.9, 0.2
RUNS: dict[str, dict[str, Any]] = {
    "gspo": {},
    "cispo": {},
    "grpo, KL": {"kl_coef": BETA},
    "rloo, KL, whitened": {"kl_coef": BETA, "normalize_advantages": True},
    "reinforce_plus_plus, KL": {"kl_coef": BETA, "gamma": GAMMA},
    "reinforce_plus_plus_baseline, KL": {"kl_coef": BETA, "gamma": GAMMA},
}


def log_prob_rows(model: Any, batch: TrainBatch, temperature: float) -> list[Tensor]:
    rows = []
    for row, length in zip(batch.rows("tokens"), batch.response_lengths_N.tolist(), strict=True):
        tokens = torch.from_numpy(row)
        log_probs = (model(tokens[None]).logits[0] / temperature).log_softmax(-1)
        rows.append(log_probs[:-1].gather(1, tokens[1:, None])[-length:, 0])
    return rows


def advantages(name: str, batch: TrainBatch, kl_rows: list[np.ndarray], flags: dict[str, Any]) -> list[np.ndarray]:
    """Return the advantages of each sample's counted tokens; an empty array for a sample that does not count."""
    estimator = name.split(",")[0]
    beta, gamma = flags.get("kl_coef", 0.0), flags.get("gamma", 1.0)
    rewards, groups = batch.columns["rewards"].astype(np.float64), batch.columns["group_indices"]
    kl = [row[mask > 0] for row, mask in zip(kl_rows, batch.rows("loss_mask"), strict=True)]
    shaped = np.asarray([reward - beta * row.sum() for reward, row in zip(rewards, kl, strict=True)])
    found: list[np.ndarray] = []
    for i in range(len(batch)):
        peers = [j for j in range(len(batch)) if groups[j] == groups[i] and not np.isnan(rewards[j])]
        whole = estimator == "reinforce_plus_plus"
        if np.isnan(rewards[i]) or (len(peers) < 2 and not whole):
            found.append(np.empty(0))
        elif "reinforce" in estimator:
            reward = rewards[i] - (0.0 if whole else rewards[peers].mean())
            back, still = [], reward
            for token_kl in kl[i][::-1]:
                still = still - beta * token_kl
                back.append(still)
                still *= gamma
            found.append(np.asarray(back[::-1]))
        elif estimator == "rloo":
            found.append(np.full(len(kl[i]), shaped[i] - np.mean([shaped[j] for j in peers if j != i])))
        else:
            scale = shaped[peers].std(ddof=1) + 1e-6
            found.append(np.full(len(kl[i]), (shaped[i] - shaped[peers].mean()) / scale))
    if "reinforce" in estimator or flags.get("normalize_advantages"):
        every = np.concatenate(found)
        found = [(row - every.mean()) / (every.std() + 1e-8) for row in found]
    return found


def by_the_formula(name: str, batch: TrainBatch, temperature: float) -> tuple[float, runs.Arrays]:
    """Return loss and gradients of the first step (ratio 1): mean over samples of the mean over their tokens."""
    model, other = (tiny.hf_model("qwen2", seed=seed).double() for seed in (0, 1))
    rows = log_prob_rows(model, batch, temperature)
    with torch.no_grad():
        kl_rows = [
            (a - b).detach().numpy() for a, b in zip(rows, log_prob_rows(other, batch, temperature), strict=True)
        ]
    losses: list[Tensor] = []
    for chosen, mask, wanted in zip(
        rows, batch.rows("loss_mask"), advantages(name, batch, kl_rows, RUNS[name]), strict=True
    ):
        kept = chosen[torch.from_numpy(mask > 0)]
        if not len(wanted):
            continue
        if name.startswith("cispo"):
            terms = kept
        elif name.startswith("gspo"):
            terms = ((kept - kept.detach()).mean()).exp()
        else:
            terms = (kept - kept.detach()).exp()
        losses.append((-torch.from_numpy(wanted) * terms).mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


def test_one_step_follows_the_papers_formula(workers: WorkerPool, hf: Path, reference: Path) -> None:
    """With one step per rollout, a KL penalty in the reward still needs the old policy's log-probs before the step."""
    batch = plain_batch()
    found: dict[str, Outcome] = {}
    for name, flags in RUNS.items():
        chosen: dict[str, Any] = {"advantage_estimator": name.split(",")[0], "clip_grad": 0.0, "lr": 0.0, **flags}
        args = tiny.make_args(hf, load=str(hf), ref_load=str(reference), **chosen)
        found[name] = workers.run(1, runs.train, args, [batch])[0]
        loss, gradients = by_the_formula(name, batch, args.rollout_temperature)
        assert found[name].metrics[0]["train/loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6), name
        assert difference(found[name].gradients, gradients) < 1e-4, name
        assert ("train/kl_loss" in found[name].metrics[0]) == ("kl_coef" in flags)
    for name in RUNS:  # control: no algorithm passes for another
        for other in RUNS:
            same = {name, other} == {"gspo", "cispo"}  # their gradients are equal until a ratio leaves 1
            assert name == other or same or difference(found[name].gradients, found[other].gradients) > 0.01


# --- whole responses over several ranks -------------------------------------------------------------------------


def _train(
    rank: int, world_size: int, init_method: str, args: Args, batch: TrainBatch, parted: bool = False
) -> Outcome:
    """Train; `parted` is a bug: each rank treats its part of a response as the whole."""

    def alone(row_R: Tensor, num_rows: int, part: Any) -> Sequences:
        return Sequences(row_R, num_rows)

    with patch("slime.megatron.microbatch._responses", alone) if parted else nullcontext():
        return runs.train(rank, world_size, init_method, args, [batch])


def test_a_response_on_two_ranks_stays_whole(workers: WorkerPool, hf: Path) -> None:
    """Compare gspo's second step, whose ratio is computed from responses that context parallelism has cut."""
    batch = tiny.random_batch(8, with_rollout=False)
    flags: dict[str, Any] = {
        "advantage_estimator": "gspo",
        "num_steps_per_rollout": 2,
        "optimizer": "sgd",
        "sgd_momentum": 0.0,
        "lr": 0.5,
        "clip_grad": 0.0,
        "eps_clip": 0.9,
        "max_tokens_per_gpu": 40,
    }

    def run(world_size: int, parted: bool = False, **more: Any) -> Outcome:
        args = tiny.make_args(hf, context_parallel_size=world_size, **{**flags, **more})
        return workers.run(world_size, _train, args, batch, parted)[0]

    def misses(found: Outcome) -> dict[str, float]:
        loss = found.metrics[0]["train/loss"] / expected.metrics[0]["train/loss"] - 1
        return {
            "loss": abs(loss),
            "gradients": difference(found.gradients, expected.gradients),
            "weights": difference(found.weights, expected.weights),
        }

    expected = run(1)
    assert abs(expected.metrics[0]["train/ppo_kl"]) > 1e-3, "the second step's policy is another"
    assert max(misses(run(2)).values()) <= 1e-5
    assert misses(run(2, parted=True))["gradients"] > 1e-3  # controls
    assert misses(run(1, advantage_estimator="grpo"))["gradients"] > 1e-3


Part = tuple[Tensor, Tensor]


def _loss(sequences: Sequences, values_R: Tensor, mask_R: Tensor) -> Tensor:
    """A loss whose gradient needs what flows back to a response's other tokens."""
    return (sequences.sum_of(values_R, mask_R).sin() * values_R + sequences.mean_of(values_R, mask_R) ** 2).sum()


def _shared(
    rank: int, world_size: int, init_method: str, parts: list[Part], values: list[Tensor], one_way: bool
) -> tuple[float, Tensor]:
    """Compute the loss over ranks; `one_way` is a bug: nothing flows back between ranks."""
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    try:
        group = dist.group.WORLD
        assert group is not None
        row_R, mask_R = parts[rank]
        values_R = values[rank].clone().requires_grad_()
        sequences = SharedSequences(row_R, 4, group)
        with patch("slime.megatron.microbatch._SumOverRanks.backward", _one_way) if one_way else nullcontext():
            loss = _loss(sequences, values_R, mask_R)
            loss.backward()
        assert values_R.grad is not None
        return loss.item(), values_R.grad
    finally:
        dist.destroy_process_group()


def _one_way(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
    return gradients[0], None


def test_sums_over_ranks_flow_back(workers: WorkerPool) -> None:
    """Deal tokens of three responses to two ranks, one without any of the second; a fourth has no token at all."""
    generator = torch.Generator().manual_seed(0)
    row_R = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    rank_R = torch.tensor([0, 1, 0, 1, 1, 0, 1, 1, 0])
    mask_R = torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 0, 1])
    values_R = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
    expected = _loss(Sequences(row_R, 4), values_R, mask_R)
    (gradient_R,) = torch.autograd.grad(expected, values_R)

    def run(one_way: bool) -> tuple[float, Tensor]:
        parts = [(row_R[rank_R == rank], mask_R[rank_R == rank]) for rank in range(2)]
        values = [values_R.detach()[rank_R == rank] for rank in range(2)]
        found = workers.run(2, _shared, parts, values, one_way)
        whole_R = torch.zeros_like(values_R)
        for rank in range(2):
            whole_R[rank_R == rank] = found[rank][1]
        return sum(loss for loss, _ in found), whole_R

    loss, found_R = run(False)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(found_R, gradient_R, rtol=1e-10)
    assert not torch.allclose(run(True)[1], gradient_R, rtol=1e-2)  # control
