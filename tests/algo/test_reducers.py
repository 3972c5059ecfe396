"""KL estimators against the exact KL, masked means, and loss weights that do not depend on how a step is cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slime.algo.reducers import KL_ESTIMATORS, bounded_kl, k1, k2, k3, loss_weights, whiten


def distributions() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.log_softmax(torch.randn(50, generator=generator).double(), -1) for _ in range(2))  # pyright: ignore


def test_k1_and_k3_are_unbiased() -> None:
    """The expectation under p is exact: it sums over the whole vocabulary."""
    log_p, log_q = distributions()
    exact = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    assert exact > 0.5
    for estimator in (k1, k3):
        torch.testing.assert_close((log_p.exp() * estimator(log_p, log_q)).sum(), exact, rtol=1e-12, atol=0)
    assert abs((log_p.exp() * k2(log_p, log_q)).sum() / exact - 1) > 0.02
    assert abs((log_p.exp() * k3(log_q, log_p)).sum() / exact - 1) > 0.02, "swapped arguments are noticed"


def test_kl_estimators_match_schulmans_formulas() -> None:
    log_p, log_q = distributions()
    ratio = (log_q - log_p).exp()
    torch.testing.assert_close(KL_ESTIMATORS["k1"](log_p, log_q), -ratio.log())
    torch.testing.assert_close(KL_ESTIMATORS["k2"](log_p, log_q), ratio.log() ** 2 / 2)
    torch.testing.assert_close(KL_ESTIMATORS["k3"](log_p, log_q), ratio - 1 - ratio.log())
    torch.testing.assert_close(KL_ESTIMATORS["low_var_kl"](log_p, log_q), ratio - 1 - ratio.log())
    assert (k3(log_p, log_q) >= 0).all() and (k1(log_p, log_q) < 0).any()


def test_k3_stays_exact_in_float32_near_zero() -> None:
    """r - 1 - log r taken literally loses everything below 1e-7, the range of most tokens' KL."""
    gap = torch.full((4,), 1e-4)
    log_p = torch.zeros(4)
    torch.testing.assert_close(k3(log_p, gap), gap**2 / 2, rtol=1e-2, atol=0)
    literal = gap.exp() - 1 - gap
    with pytest.raises(AssertionError):
        torch.testing.assert_close(literal, gap**2 / 2, rtol=1e-2, atol=0)


def test_a_bounded_kl_stays_in_its_range() -> None:
    log_p = torch.tensor([-4.0, -0.625, -2.5, -1.5, -2.0, float("-inf")], dtype=torch.float64, requires_grad=True)
    kl, beyond = bounded_kl("k1", log_p, torch.full((6,), -2.0, dtype=torch.float64), 1.5)
    assert kl.tolist() == [-1.5, 1.375, -0.5, 0.5, 0.0, -1.5]
    assert beyond is not None and beyond.tolist() == [True, False, False, False, False, True]
    (gradient,) = torch.autograd.grad(kl.sum(), log_p)
    assert gradient.tolist() == [0, 1, 1, 1, 1, 0]
    plain, none = bounded_kl("k1", log_p, torch.full((6,), -2.0, dtype=torch.float64), None)
    assert plain[0] == -2.0 and none is None


def test_only_masked_entries_are_whitened() -> None:
    values, mask = torch.tensor([1.0, 2.0, float("nan"), 6.0]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    white = whiten(values, mask, lambda entries: float(entries.sum()))
    kept = torch.tensor([1.0, 2.0, 6.0])
    torch.testing.assert_close(white[mask != 0], (kept - 3) / kept.std(correction=0))
    assert white[2].item() == 0.0


MASK = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
LENGTHS = torch.tensor([3, 1, 2, 0, 1])  # the fourth has no response, the fifth an empty mask


def test_per_sample_weights() -> None:
    everything = torch.ones(5, dtype=torch.bool)
    weights = loss_weights(MASK, LENGTHS, everything, per_token=False)
    third = 1 / 3  # three samples count
    assert weights.dtype == torch.float64
    assert weights.tolist() == pytest.approx([third / 2, third / 2, 0, third, third / 2, third / 2, 0])
    failed = everything.clone()
    failed[2] = False
    assert loss_weights(MASK, LENGTHS, failed, per_token=False).tolist() == pytest.approx([0.25, 0.25, 0, 0.5, 0, 0, 0])


def test_per_token_weights() -> None:
    everything = torch.ones(5, dtype=torch.bool)
    weights = loss_weights(MASK, LENGTHS, everything, per_token=True)
    assert weights.tolist() == pytest.approx([0.2, 0.2, 0, 0.2, 0.2, 0.2, 0])
    assert not torch.allclose(weights, loss_weights(MASK, LENGTHS, everything, per_token=False))


def test_fractions_give_weighted_means() -> None:
    """A sample of weight 0.25 has the same mean as one of weight 1; per token it counts a quarter."""
    mask, lengths, counted = torch.tensor([0.25, 0.0, 0.25, 1.0, 0.5]), torch.tensor([3, 2]), torch.tensor([True, True])
    per_sample, per_token = (loss_weights(mask, lengths, counted, per_token=each).tolist() for each in (False, True))
    assert per_sample == pytest.approx([1 / 4, 0, 1 / 4, 1 / 3, 1 / 6])
    assert per_token == pytest.approx([1 / 8, 0, 1 / 8, 1 / 2, 1 / 4])


@pytest.mark.parametrize("per_token", [True, False])
def test_weights_are_zero_if_nothing_counts(per_token: bool) -> None:
    none = torch.zeros(5, dtype=torch.bool)
    assert loss_weights(MASK, LENGTHS, none, per_token=per_token).tolist() == [0.0] * 7


@given(
    samples=st.lists(st.tuples(st.lists(st.booleans(), max_size=6), st.booleans()), min_size=1, max_size=12),
    cut=st.integers(0, 12),
    per_token=st.booleans(),
)
def test_the_loss_does_not_depend_on_the_cut(samples: list[tuple[list[bool], bool]], cut: int, per_token: bool) -> None:
    """The sum over two micro-batches equals the definition on the whole step; a mean of means does not (control)."""
    mask = torch.tensor([float(m) for masks, _ in samples for m in masks])
    lengths = torch.tensor([len(masks) for masks, _ in samples])
    counted = torch.tensor([counts for _, counts in samples])
    losses = torch.arange(1, len(mask) + 1).double()
    weights = loss_weights(mask, lengths, counted, per_token=per_token)
    split = int(lengths[:cut].sum())
    summed = (weights[:split] * losses[:split]).sum() + (weights[split:] * losses[split:]).sum()

    rows = zip(losses.split(lengths.tolist()), mask.split(lengths.tolist()), counted.tolist(), strict=True)
    kept = [row[row_mask != 0] for row, row_mask, counts in rows if counts and bool((row_mask != 0).any())]
    if not kept:
        assert summed == 0
        return
    expected = torch.cat(kept).mean() if per_token else torch.stack([row.mean() for row in kept]).mean()
    torch.testing.assert_close(summed, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0).double(), rtol=1e-12, atol=0)
