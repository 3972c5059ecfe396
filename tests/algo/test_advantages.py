"""GRPO's advantages against the paper's formula, written out in plain Python."""

import doctest
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.algo.advantages import counted_rows, rollout_rewards
from slime.algo.advantages.grpo import grpo_advantages

NAN = float("nan")


def by_the_paper(rewards: list[float], groups: list[int], *, normalize_std: bool) -> list[float]:
    """Compute (r_i - mean(r)) / std(r) (DeepSeekMath, section 4.1.2) over the rewards that exist."""
    result: list[float] = []
    for reward, group in zip(rewards, groups, strict=True):
        peers = [r for r, g in zip(rewards, groups, strict=True) if g == group and not math.isnan(r)]
        if math.isnan(reward) or len(set(peers)) < 2:
            result.append(0.0)
            continue
        scale = statistics.stdev(peers) + 1e-6 if normalize_std else 1.0
        result.append((reward - statistics.fmean(peers)) / scale)
    return result


@given(
    rows=st.lists(
        st.tuples(st.one_of(st.floats(-10, 10, width=32), st.just(NAN)), st.integers(0, 5)), min_size=1, max_size=40
    ),
    normalize_std=st.booleans(),
)
def test_grpo_matches_the_paper(rows: list[tuple[float, int]], normalize_std: bool) -> None:
    rewards, groups = [r for r, _ in rows], [g for _, g in rows]
    advantages = grpo_advantages(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), normalize_std=normalize_std
    )
    expected = by_the_paper(rewards, groups, normalize_std=normalize_std)
    assert advantages.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_biased_std_is_noticed() -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 1.0]).double(), torch.zeros(4, dtype=torch.int64)
    advantages = grpo_advantages(rewards, groups, normalize_std=True)
    biased = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
    torch.testing.assert_close(
        advantages, torch.tensor([1.0, -1, -1, 1]).double() * math.sqrt(3) / 2, rtol=1e-5, atol=0
    )
    with pytest.raises(AssertionError):
        torch.testing.assert_close(advantages, biased, rtol=1e-2, atol=0)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1e-30, -1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(reward: float, dtype: torch.dtype) -> None:
    """Try 0.1 among others: three times 0.1 add up to 0.30000000000000004."""
    advantages = grpo_advantages(torch.full((7,), reward, dtype=dtype), torch.zeros(7, dtype=torch.int64))
    assert advantages.tolist() == [0.0] * 7


def test_failed_rewards_leave_the_baseline() -> None:
    rewards = torch.tensor([1.0, 0.0, NAN, 1.0, NAN, 0.5, 3.0])
    groups = torch.tensor([7, 7, 7, 4, 4, 4, 9])
    counted = counted_rows(rewards, groups)
    assert counted.tolist() == [True, True, False, True, False, True, False]  # group 9 has one reward: no baseline
    advantages = grpo_advantages(rewards, groups)
    kept = grpo_advantages(rewards[counted], groups[counted])
    assert torch.equal(advantages[counted], kept)
    assert advantages[~counted].tolist() == [0.0, 0.0, 0.0]
    as_zero = grpo_advantages(rewards.nan_to_num(0.0), groups)
    assert not torch.allclose(as_zero[counted], kept), "a failed reward taken as 0 would move the baseline"


def test_groups_follow_the_index_not_the_order() -> None:
    rewards, groups = torch.tensor([1.0, 5.0, 0.0, 6.0, 2.0]), torch.tensor([3, 1, 3, 1, 3])
    order = torch.tensor([4, 1, 0, 3, 2])
    torch.testing.assert_close(
        grpo_advantages(rewards, groups)[order], grpo_advantages(rewards[order], groups[order]), rtol=0, atol=1e-7
    )
    assert not torch.allclose(grpo_advantages(rewards, groups), grpo_advantages(rewards, torch.zeros(5)))


def test_examples_in_docstrings_hold() -> None:
    result = doctest.testmod(rollout_rewards)
    assert result.attempted == 6 and result.failed == 0
