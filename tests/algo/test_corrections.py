"""Importance weights: the formula, and their purpose, an estimate that is not biased by stale samples."""

import math

import pytest
import torch
from torch import Tensor

from slime.algo.corrections import importance_weights
from slime.algo.losses import LossInputs, LossOptions, policy_loss

OPTIONS = LossOptions(
    surrogate="token",
    eps_clip=0.2,
    eps_clip_high=0.2,
    eps_clip_c=None,
    kl_loss_coef=0.0,
    kl_loss_type="k3",
    entropy_coef=0.0,
    offpolicy_correction="tis",
    tis_clip=1e9,
    tis_clip_low=0.0,
)


@pytest.mark.parametrize("drop", [False, True])
def test_weights_match_the_formula(drop: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    proximal, behaviour = (-torch.rand(200, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    weighted = torch.rand(200, generator=generator) < 0.7
    weights, beyond = importance_weights(proximal, behaviour, weighted, low=0.5, high=2.0, drop=drop)
    for t in range(200):
        ratio = math.exp(float(proximal[t]) - float(behaviour[t]))
        outside = bool(weighted[t]) and not 0.5 <= ratio <= 2.0
        expected = 0.0 if outside and drop else min(max(ratio, 0.5), 2.0)
        assert float(weights[t]) == pytest.approx(expected if weighted[t] else 1.0, rel=1e-12)
        assert bool(beyond[t]) == outside
    assert 20 < int(beyond.sum()) < int(weighted.sum()) - 20, "the draw has tokens inside and outside the range"


def test_uncorrected_tokens_have_weight_one() -> None:
    """A tool's tokens were never sampled, so the value in place of their log-prob may be anything."""
    behaviour = torch.tensor([float("nan"), float("-inf"), 0.0, -1.0])
    weighted = torch.tensor([False, False, False, True])
    weights, beyond = importance_weights(torch.full((4,), -50.0), behaviour, weighted, low=0.1, high=2.0)
    assert weights.tolist() == pytest.approx([1, 1, 1, 0.1]) and weights[:3].eq(1).all()
    assert beyond.tolist() == [False, False, False, True]
    log_probs = torch.full((4,), -50.0, requires_grad=True)
    inputs = LossInputs(
        log_probs, log_probs.detach(), torch.ones(4), rollout_log_probs_R=behaviour, weighted_R=weighted
    )
    policy_loss(inputs, OPTIONS)[0].sum().backward()
    assert log_probs.grad is not None and log_probs.grad.isfinite().all()


# --- the estimate -----------------------------------------------------------------------------------------------
# The policy chooses one of six tokens. The expectation sums over all six outcomes, so there is no sampling noise.

REWARDS = torch.tensor([1.0, -0.5, 0.3, 0.0, 2.0, -1.0]).double()
PROXIMAL = torch.tensor([0.2, -0.4, 0.9, 0.1, -1.2, 0.6]).double()
BEHAVIOUR = torch.tensor([0.5, 0.3, -0.6, 0.2, -0.2, 0.0]).double()


def expected_gradient(sampled_from: Tensor, *, weighted: bool, moved: float = 0.0, **options: float | str) -> Tensor:
    """Return the gradient of the logits: the sum over outcomes of P(outcome) x the gradient of that outcome's loss.

    `moved`: how far the earlier steps have moved the policy from the old one.
    """
    logits = (PROXIMAL + moved * REWARDS).requires_grad_()
    log_probs = logits.log_softmax(0)
    inputs = LossInputs(
        log_probs_R=log_probs,
        old_log_probs_R=PROXIMAL.log_softmax(0),
        advantages_R=REWARDS,
        rollout_log_probs_R=sampled_from.log_softmax(0),
        weighted_R=torch.ones(6, dtype=torch.bool) if weighted else None,
    )
    loss, _ = policy_loss(inputs, LossOptions(**{**vars(OPTIONS), **options}))
    return torch.autograd.grad((sampled_from.softmax(0) * loss).sum(), logits)[0]


@pytest.mark.parametrize("moved", [0.0, 0.05])
def test_weights_make_stale_samples_unbiased(moved: float) -> None:
    wanted = expected_gradient(PROXIMAL, weighted=False, moved=moved)
    assert wanted.abs().max() > 0.1
    found = expected_gradient(BEHAVIOUR, weighted=True, moved=moved)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14)
    assert (expected_gradient(BEHAVIOUR, weighted=False, moved=moved) - wanted).abs().max() > 0.05  # control


def test_on_policy_gives_the_policy_gradient() -> None:
    """d/dz sum_a softmax(z)_a r_a = p (r - p . r), so the expectation above is the right one."""
    p = PROXIMAL.softmax(0)
    assert torch.allclose(expected_gradient(PROXIMAL, weighted=False), -p * (REWARDS - p @ REWARDS), rtol=1e-12)
    assert torch.allclose(expected_gradient(PROXIMAL, weighted=True), -p * (REWARDS - p @ REWARDS), rtol=1e-12)


def test_truncation_biases_less_than_no_weight() -> None:
    wanted = expected_gradient(PROXIMAL, weighted=False)
    none = (expected_gradient(BEHAVIOUR, weighted=False) - wanted).norm()
    weights = (PROXIMAL.log_softmax(0) - BEHAVIOUR.log_softmax(0)).exp()
    assert 2 < weights.max() < 5
    for mode in ("tis", "mis"):
        clipped = expected_gradient(BEHAVIOUR, weighted=True, tis_clip=2.0, offpolicy_correction=mode)
        assert 0.01 < (clipped - wanted).norm() < none


def test_token_weights_correct_each_prefix_alone() -> None:
    """With two tokens, the weights correct the second token given the first, but not how often a first token came."""
    second_proximal = torch.stack([PROXIMAL.roll(i) for i in range(6)])
    second_behaviour = torch.stack([BEHAVIOUR.roll(2 * i) for i in range(6)])

    def gradient(prefixes: Tensor, sampled_from: Tensor, *, weighted: bool) -> Tensor:
        logits = second_proximal.clone().requires_grad_()
        log_probs = logits.log_softmax(1)
        inputs = LossInputs(
            log_probs_R=log_probs.flatten(),
            old_log_probs_R=log_probs.detach().flatten(),
            advantages_R=torch.outer(REWARDS, REWARDS).flatten(),
            rollout_log_probs_R=sampled_from.log_softmax(1).flatten(),
            weighted_R=torch.ones(36, dtype=torch.bool) if weighted else None,
        )
        chance = prefixes.softmax(0)[:, None] * sampled_from.softmax(1)
        return torch.autograd.grad((chance.flatten() * policy_loss(inputs, OPTIONS)[0]).sum(), logits)[0]

    found = gradient(BEHAVIOUR, second_behaviour, weighted=True)
    assert torch.allclose(found, gradient(BEHAVIOUR, second_proximal, weighted=False), rtol=1e-12, atol=1e-14)
    everywhere = gradient(PROXIMAL, second_proximal, weighted=False)
    assert not torch.allclose(found, everywhere, rtol=0.1)
    of_prefix = PROXIMAL.softmax(0) / BEHAVIOUR.softmax(0)
    assert torch.allclose(found * of_prefix[:, None], everywhere, rtol=1e-12, atol=1e-14)
