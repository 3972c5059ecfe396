"""The value loss against a float64 loop and finite differences, and explained variance against its definition."""

from __future__ import annotations

import statistics

import pytest
import torch

from slime.algo.values import explained_variance, value_loss


def by_hand(value: float, old: float, target: float, clip: float) -> tuple[float, float]:
    """Return the larger of both squares / 2, and its derivative with respect to the value."""
    near = old + min(max(value - old, -clip), clip)
    plain, clipped = (value - target) ** 2 / 2, (near - target) ** 2 / 2
    if plain >= clipped:
        return plain, value - target
    return clipped, (near - target) if abs(value - old) < clip else 0.0


def made_up() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values, old, targets = torch.randn(3, 200, generator=generator, dtype=torch.float64).unbind()
    return values.requires_grad_(), old, targets


@pytest.mark.parametrize("clip", [0.05, 0.5, 5.0])
def test_clipped_loss_and_gradient(clip: float) -> None:
    values, old, targets = made_up()
    loss, metrics = value_loss(values, old, targets, clip=clip)
    loss.sum().backward()
    assert values.grad is not None
    expected = [by_hand(*row, clip) for row in zip(values.tolist(), old.tolist(), targets.tolist(), strict=True)]
    assert loss.tolist() == pytest.approx([each for each, _ in expected], rel=1e-12)
    assert values.grad.tolist() == pytest.approx([slope for _, slope in expected], rel=1e-12)
    assert metrics["clip_fraction"].tolist() == [float(slope == 0) for _, slope in expected]
    assert 0 < metrics["clip_fraction"].mean() < 1 or clip == 5.0
    # central differences of the loss alone
    step = 1e-6
    sides = [value_loss(values.detach() + side, old, targets, clip=clip)[0] for side in (step, -step)]
    torch.testing.assert_close((sides[0] - sides[1]) / (2 * step), values.grad, rtol=1e-5, atol=1e-6)


def test_without_clip_the_loss_is_the_square() -> None:
    values, old, targets = made_up()
    loss, metrics = value_loss(values, old, targets, clip=None)
    torch.testing.assert_close(loss, (values - targets) ** 2 / 2)
    assert not metrics
    clipped, _ = value_loss(values, old, targets, clip=0.1)
    assert bool((clipped >= loss).all()) and not torch.allclose(clipped, loss), "control: a clip is noticed"


def test_the_first_step_is_never_clipped() -> None:
    """In the first step the values equal the old values."""
    values, _, targets = made_up()
    loss, metrics = value_loss(values, values.detach(), targets, clip=0.01)
    torch.testing.assert_close(loss, (values - targets) ** 2 / 2)
    assert not metrics["clip_fraction"].any()


def test_explained_variance() -> None:
    values, _, returns = made_up()
    values, mask = values.detach() / 2 + returns, torch.arange(200) % 3 > 0
    gaps = [(r - v) for v, r, m in zip(values.tolist(), returns.tolist(), mask.tolist(), strict=True) if m]
    kept = [r for r, m in zip(returns.tolist(), mask.tolist(), strict=True) if m]
    expected = 1 - statistics.pvariance(gaps) / statistics.pvariance(kept)
    assert explained_variance(values, returns, mask) == pytest.approx(expected, rel=1e-12)
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(returns + 3, returns, mask) == pytest.approx(1.0), "a constant gap explains nothing less"
    assert explained_variance(torch.zeros(200), returns, mask) == pytest.approx(0.0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert explained_variance(values, torch.ones(200), mask) is None
    assert explained_variance(values, returns, torch.zeros(200, dtype=torch.bool)) is None
