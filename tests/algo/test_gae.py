"""GAE against the paper's sums in float64 loops, and identities that hold for any numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from slime.algo.advantages import ESTIMATORS, AdvantageOptions, RolloutRewards

NAN = float("nan")


def by_the_paper(
    score: float, mask: list[float], kl: list[float], values: list[float], *, beta: float, gamma: float, lambd: float
) -> list[float]:
    """Eq. 16, the sum over l of (gamma lambda)^l delta_(t+l), for one response whose masked tokens are not steps."""
    steps = [t for t, counts in enumerate(mask) if counts]
    rewards = [-beta * kl[t] for t in steps]
    if rewards:
        rewards[-1] += score
    value = [*(values[t] for t in steps), 0.0]
    deltas = [rewards[i] + gamma * value[i + 1] - value[i] for i in range(len(steps))]
    advantages = [0.0] * len(mask)
    for i, t in enumerate(steps):
        advantages[t] = math.fsum((gamma * lambd) ** (j - i) * deltas[j] for j in range(i, len(steps)))
    return advantages


def made_up(seed: int, lengths: tuple[int, ...] = (5, 1, 9, 3)) -> RolloutRewards:
    """Return samples of several lengths: masked tokens in the middle and at the end, a masked and a failed sample."""
    generator = np.random.default_rng(seed)
    total = sum(lengths)
    mask = (generator.random(total) > 0.3).astype(np.float32)
    mask[-lengths[-1] :] = 0
    rewards = generator.normal(size=len(lengths))
    rewards[1] = NAN
    return RolloutRewards(
        rewards_N=torch.from_numpy(rewards),
        group_indices_N=torch.arange(len(lengths)),
        counted_N=~torch.from_numpy(rewards).isnan(),
        response_lengths_N=torch.tensor(lengths),
        loss_mask_R=torch.from_numpy(mask),
        kl_R=torch.from_numpy(generator.normal(size=total)),
        values_R=torch.from_numpy(generator.normal(size=total)),
    )


def expected(rollout: RolloutRewards, options: AdvantageOptions) -> list[float]:
    assert rollout.kl_R is not None and rollout.values_R is not None
    lengths = rollout.response_lengths_N.tolist()
    rows = [part.tolist() for part in rollout.kl_R.split(lengths)]
    values = [part.tolist() for part in rollout.values_R.split(lengths)]
    masks = [part.tolist() for part in rollout.loss_mask_R.split(lengths)]
    found: list[float] = []
    for row, score in enumerate(rollout.rewards_N.tolist()):
        counted = masks[row] if not math.isnan(score) else [0.0] * lengths[row]
        found += by_the_paper(
            score,
            counted,
            rows[row],
            values[row],
            beta=options.kl_coef,
            gamma=options.gamma,
            lambd=options.lambd,
        )
    return found


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lambd", [1.0, 0.95, 0.0])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_gae_matches_the_paper(gamma: float, lambd: float, kl_coef: float) -> None:
    options = AdvantageOptions(gamma=gamma, lambd=lambd, kl_coef=kl_coef)
    for seed in range(5):
        rollout = made_up(seed)
        found = ESTIMATORS["ppo"](rollout, options)
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(expected(rollout, options), rel=1e-12, abs=1e-12)


def test_other_formulas_differ() -> None:
    """Each of these is another formula, and must give other numbers."""
    options, rollout = AdvantageOptions(gamma=0.9, lambd=0.95, kl_coef=0.3), made_up(0)
    right = torch.tensor(expected(rollout, options), dtype=torch.float64)
    assert rollout.values_R is not None and rollout.kl_R is not None
    for wrong in (
        expected(rollout, replace(options, gamma=0.95, lambd=0.9)),
        expected(replace(rollout, loss_mask_R=torch.ones_like(rollout.loss_mask_R)), options),
        expected(replace(rollout, values_R=rollout.values_R.roll(1)), options),
        expected(replace(rollout, kl_R=-rollout.kl_R), options),
    ):
        assert not torch.allclose(right, torch.tensor(wrong, dtype=torch.float64), rtol=1e-3)


def test_uncounted_tokens_change_nothing() -> None:
    options, rollout = AdvantageOptions(gamma=0.9, lambd=0.95, kl_coef=0.3), made_up(1)
    assert rollout.values_R is not None and rollout.kl_R is not None
    spoilt = replace(
        rollout,
        values_R=torch.where(rollout.mask_R, rollout.values_R, NAN),
        kl_R=torch.where(rollout.mask_R, rollout.kl_R, NAN),
    )
    assert torch.equal(ESTIMATORS["ppo"](spoilt, options), ESTIMATORS["ppo"](rollout, options))


def test_perfect_values_leave_no_advantage() -> None:
    rollout = replace(made_up(2), kl_R=None)
    assert rollout.values_R is not None
    advantages_R = ESTIMATORS["ppo"](rollout, AdvantageOptions())
    returns_R = torch.where(rollout.mask_R, advantages_R + rollout.values_R, 0.0)
    scores_R = torch.where(rollout.mask_R, rollout.spread(rollout.rewards_N), 0.0)
    torch.testing.assert_close(returns_R, scores_R, rtol=0, atol=1e-12)
    for lambd in (0.0, 0.7, 1.0):
        perfect = ESTIMATORS["ppo"](replace(rollout, values_R=scores_R), AdvantageOptions(lambd=lambd))
        assert perfect.abs().max() < 1e-12


def test_rollouts_in_which_nothing_counts() -> None:
    rollout = made_up(3)
    nothing = replace(rollout, counted_N=torch.zeros_like(rollout.counted_N))
    assert not ESTIMATORS["ppo"](nothing, AdvantageOptions(kl_coef=0.1)).any()
