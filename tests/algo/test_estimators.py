"""Every estimator against its paper's formula, in loops over Python floats, on rollouts with every special case.

The rollouts have groups of one to five samples, failed rewards, empty masks, responses without tokens, and masked
tokens in the middle.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from slime.algo.advantages import ESTIMATORS, AdvantageOptions, RolloutRewards, counted_rows
from slime.algo.estimators import ESTIMATOR_FACTS

Rows = list[list[float]]


@dataclass(frozen=True)
class Sample:
    """One response, in the form that the papers use."""

    reward: float
    group: int
    mask: list[float]
    kl: list[float]

    @property
    def places(self) -> list[int]:
        """The positions of the tokens that count."""
        return [t for t, m in enumerate(self.mask) if m]


def draw(seed: int = 0) -> list[Sample]:
    """Return 23 samples of 7 groups, not ordered by group."""
    generator = torch.Generator().manual_seed(seed)

    def number() -> float:
        return float(torch.randn((), generator=generator, dtype=torch.float64))

    samples = []
    for index, group in enumerate([4, 0, 1, 2, 3, 0, 1, 2, 4, 0, 1, 2, 4, 1, 2, 1, 5, 5, 6, 6, 6, 6, 0]):
        length = [0, 1, 4, 7, 3][index % 5] if index != 16 else 5
        mask = [float(number() < 0.8) for _ in range(length)]
        reward = float("nan") if index in (2, 17, 18) else 0.25 if group == 0 else number()
        samples.append(Sample(reward, group, mask, [0.3 * number() for _ in range(length)]))
    samples[7] = replace(samples[7], mask=[0.0] * len(samples[7].mask))
    return samples


def rollout_of(samples: list[Sample], name: str, *, with_kl: bool = True) -> RolloutRewards:
    rewards = torch.tensor([s.reward for s in samples], dtype=torch.float64)
    groups = torch.tensor([s.group for s in samples])
    return RolloutRewards(
        rewards_N=rewards,
        group_indices_N=groups,
        counted_N=counted_rows(rewards, groups, compares_group=ESTIMATOR_FACTS[name].compares_group),
        response_lengths_N=torch.tensor([len(s.mask) for s in samples]),
        loss_mask_R=torch.tensor([m for s in samples for m in s.mask]),
        kl_R=torch.tensor([k for s in samples for k in s.kl], dtype=torch.float64) if with_kl else None,
    )


# --- the papers -------------------------------------------------------------------------------------------------


def judged(samples: list[Sample], group: int) -> list[Sample]:
    return [s for s in samples if s.group == group and not math.isnan(s.reward)]


def shaped(sample: Sample, beta: float) -> float:
    """RLOO (arXiv:2402.14740, section 2.1): the reward minus beta x the log-ratio of the whole response."""
    return sample.reward - beta * sum(sample.kl[t] for t in sample.places)


def of_response(samples: list[Sample], values: dict[int, float]) -> Rows:
    """Put a sample's number on each token that counts; 0 if it has none."""
    return [[values.get(i, 0.0) * (m != 0) for m in s.mask] for i, s in enumerate(samples)]


def grpo(samples: list[Sample], options: AdvantageOptions) -> Rows:
    values: dict[int, float] = {}
    for i, sample in enumerate(samples):
        peers = [shaped(s, options.kl_coef) for s in judged(samples, sample.group)]
        if math.isnan(sample.reward) or len(peers) < 2 or len(set(peers)) == 1:
            continue
        scale = statistics.stdev(peers) + 1e-6 if options.normalize_std else 1.0
        values[i] = (shaped(sample, options.kl_coef) - statistics.fmean(peers)) / scale
    return of_response(samples, values)


def rloo(samples: list[Sample], options: AdvantageOptions, *, with_own: bool = False) -> Rows:
    """Section 2.3: R_i - 1 / (k - 1) x the sum of R_j over j != i."""
    values: dict[int, float] = {}
    for i, sample in enumerate(samples):
        others = [shaped(s, options.kl_coef) for s in judged(samples, sample.group) if with_own or s is not sample]
        if not math.isnan(sample.reward) and others:
            values[i] = shaped(sample, options.kl_coef) - sum(others) / len(others)
    return of_response(samples, values)


def returns(sample: Sample, reward: float, options: AdvantageOptions) -> list[float]:
    """REINFORCE++ (arXiv:2501.03262): the discounted sum of rewards from each token on; 0 on a masked token."""
    found = [0.0] * len(sample.mask)
    for k, t in enumerate(sample.places):
        for later, s in enumerate(sample.places[k:]):
            gained = -options.kl_coef * sample.kl[s] + (reward if s == sample.places[-1] else 0.0)
            found[t] += options.gamma**later * gained
    return found


def whitened(samples: list[Sample], rows: Rows, counted: list[bool]) -> Rows:
    kept = [rows[i][t] for i, s in enumerate(samples) if counted[i] for t in s.places]
    mean, std = statistics.fmean(kept), statistics.pstdev(kept)
    return [
        [(rows[i][t] - mean) / (std + 1e-8) * (m != 0) if counted[i] else 0.0 for t, m in enumerate(s.mask)]
        for i, s in enumerate(samples)
    ]


def reinforce_plus_plus(samples: list[Sample], options: AdvantageOptions) -> Rows:
    counted = [not math.isnan(s.reward) for s in samples]
    return whitened(samples, [returns(s, s.reward, options) for s in samples], counted)


def reinforce_plus_plus_baseline(samples: list[Sample], options: AdvantageOptions) -> Rows:
    rows, counted = [], []
    for sample in samples:
        peers = [s.reward for s in judged(samples, sample.group)]
        counted.append(not math.isnan(sample.reward) and len(peers) > 1)
        rows.append(returns(sample, sample.reward - statistics.fmean(peers) if peers else 0.0, options))
    return whitened(samples, rows, counted)


def on_policy_distillation(samples: list[Sample], options: AdvantageOptions) -> Rows:
    """GKD (arXiv:2306.13649): log p_teacher - log p_student, token by token, on samples that have a reward."""
    return [[-k * (m != 0) for k, m in zip(s.kl, s.mask, strict=True)] for s in samples]


PAPERS = {
    "grpo": grpo,
    "gspo": grpo,
    "cispo": grpo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "on_policy_distillation": on_policy_distillation,
}
OPTIONS = {
    "plain": AdvantageOptions(),
    "KL": AdvantageOptions(kl_coef=0.3),
    "KL, discounted": AdvantageOptions(kl_coef=0.3, gamma=0.9),
    "without std": AdvantageOptions(normalize_std=False),
}


def miss(name: str, options: AdvantageOptions, expected: Rows, samples: list[Sample]) -> float:
    """Return the largest difference on any token that counts."""
    rollout = rollout_of(samples, name)
    found = ESTIMATORS[name](rollout, options)
    assert found.dtype == torch.float64
    flat = torch.tensor([value for row in expected for value in row], dtype=torch.float64)
    return float((found - flat)[rollout.mask_R].abs().amax())


@pytest.mark.parametrize("which", OPTIONS)
@pytest.mark.parametrize("name", PAPERS)
def test_each_matches_its_paper(name: str, which: str) -> None:
    for seed in range(3):
        samples = draw(seed)
        assert miss(name, OPTIONS[which], PAPERS[name](samples, OPTIONS[which]), samples) < 1e-12


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_kl_in_the_reward_is_bounded(name: str) -> None:
    """Each token's KL is bounded before the sum; a teacher's log-ratio is no penalty and is never bounded."""
    samples, options = draw(), AdvantageOptions(kl_coef=0.3, kl_clamp=0.2)
    bounded = [replace(s, kl=[min(max(k, -0.2), 0.2) for k in s.kl]) for s in samples]
    assert miss(name, options, PAPERS[name](bounded, options), samples) < 1e-12
    assert miss(name, options, PAPERS[name](samples, options), samples) > 1e-2  # control
    distilled = on_policy_distillation(samples, options)
    assert miss("on_policy_distillation", options, distilled, samples) < 1e-12


def test_other_formulas_differ() -> None:
    """Control: a baseline with the sample's own reward, no discount, no KL, and another estimator are all noticed."""
    samples, options = draw(), OPTIONS["KL, discounted"]
    assert miss("rloo", options, rloo(samples, options, with_own=True), samples) > 0.1
    for name in ("reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        for wrong in (replace(options, gamma=1.0), replace(options, kl_coef=0.0), replace(options, gamma=0.89)):
            assert miss(name, options, PAPERS[name](samples, wrong), samples) > 1e-3
    kinds = ("grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
    assert all(miss(a, options, PAPERS[b](samples, options), samples) > 0.1 for a in kinds for b in kinds if a != b)
    unmasked = [replace(s, mask=[1.0] * len(s.mask)) for s in samples]
    for name in kinds:
        assert miss(name, options, PAPERS[name](unmasked, options), samples) > 1e-2


@pytest.mark.parametrize("name", PAPERS)
def test_uncounted_tokens_change_nothing(name: str) -> None:
    """Masked tokens may have any KL, and a failed sample may have any tokens."""
    samples, options = draw(), OPTIONS["KL, discounted"]
    rollout = rollout_of(samples, name)
    assert rollout.kl_R is not None and not rollout.mask_R.all()
    other = replace(rollout, kl_R=torch.where(rollout.mask_R, rollout.kl_R, float("nan")))
    found, again = (ESTIMATORS[name](r, options)[rollout.mask_R] for r in (rollout, other))
    assert torch.equal(found, again)
    moved = replace(rollout, kl_R=torch.where(rollout.mask_R, rollout.kl_R + 0.1, 0.0))
    assert not torch.allclose(ESTIMATORS[name](moved, options)[rollout.mask_R], found)  # control


@pytest.mark.parametrize("name", PAPERS)
def test_rollouts_in_which_nothing_counts(name: str) -> None:
    """If all rewards failed, or all masks are empty, there is no error and no nan."""
    samples = draw()
    for nothing in (
        [replace(s, reward=float("nan")) for s in samples],
        [replace(s, mask=[0.0] * len(s.mask)) for s in samples],
        [replace(s, mask=[], kl=[]) for s in samples],
    ):
        rollout = rollout_of(nothing, name)
        assert not rollout.mask_R.any()
        found = ESTIMATORS[name](rollout, OPTIONS["KL, discounted"])
        assert len(found) == len(rollout.loss_mask_R) and found.isfinite().all()


@pytest.mark.parametrize("name", [name for name in PAPERS if not ESTIMATOR_FACTS[name].distills])
def test_equal_rewards_give_no_advantage(name: str) -> None:
    samples = [replace(s, reward=0.1) for s in draw()]
    found = ESTIMATORS[name](rollout_of(samples, name, with_kl=False), AdvantageOptions())
    assert found.abs().amax() < 1e-6


def test_every_estimator_has_a_formula() -> None:
    assert set(PAPERS) == set(ESTIMATORS) - {"ppo"}  # `test_gae` tests ppo


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_facts_describe_the_function(name: str) -> None:
    facts, samples = ESTIMATOR_FACTS[name], draw()
    rollout = rollout_of(samples, name)
    if facts.needs_values:
        rollout = replace(rollout, values_R=torch.linspace(-1, 1, len(rollout.loss_mask_R), dtype=torch.float64))

    def advantages(rewards: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        changed = rollout if rewards is None else replace(rollout, rewards_N=rewards)
        return ESTIMATORS[name](changed, AdvantageOptions(**options))[rollout.mask_R]

    def same(found: torch.Tensor) -> bool:
        return torch.allclose(found, advantages(), rtol=1e-9, atol=1e-9)

    assert facts.discounts != same(advantages(gamma=0.5))
    assert facts.divides_by_std != same(advantages(normalize_std=False))
    assert facts.whitens == (abs(float(advantages().mean())) < 1e-9)
    assert facts.distills == same(advantages(rewards=rollout.rewards_N * 2 + 1))
    shifted = rollout.rewards_N + 3 * rollout.group_indices_N  # a baseline of the group's mean takes this away
    assert (facts.compares_group ^ facts.distills) == same(advantages(rewards=shifted)), "never both"
    assert facts.surrogate == {"gspo": "sequence", "cispo": "cispo"}.get(name, "token")
    if facts.needs_values:
        with pytest.raises(AssertionError, match="values"):
            ESTIMATORS[name](replace(rollout, values_R=None), AdvantageOptions())
