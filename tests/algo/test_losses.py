"""Losses against the papers' equations in plain float64 Python, and gradients against finite differences."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slime.algo.losses import LOSSES, LossInputs, LossOptions, policy_loss, sft_loss

OPTIONS = LossOptions(
    surrogate="token",
    eps_clip=0.2,
    eps_clip_high=0.28,
    eps_clip_c=None,
    kl_loss_coef=0.0,
    kl_loss_type="low_var_kl",
    entropy_coef=0.0,
    offpolicy_correction="tis",
    tis_clip=2.0,
    tis_clip_low=0.0,
)


def make_inputs(**changes: Any) -> LossInputs:
    """Return 64 tokens with ratios on both sides of both clip bounds, and advantages of both signs."""
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float) -> Tensor:
        return scale * torch.randn(64, generator=generator, dtype=torch.float64)

    old = -draw(1.0).abs() - 1
    inputs = LossInputs(
        log_probs_R=old + draw(0.5),
        old_log_probs_R=old,
        advantages_R=draw(1.0),
        ref_log_probs_R=old + draw(0.7),
        rollout_log_probs_R=old + draw(0.8),
        entropy_R=draw(1.0).abs(),
    )
    return replace(inputs, **changes)


def by_the_papers(inputs: LossInputs, options: LossOptions) -> list[float]:
    """Compute each token's loss from the equations, with nothing but `math`."""
    result: list[float] = []
    ref, rollout, entropy = inputs.ref_log_probs_R, inputs.rollout_log_probs_R, inputs.entropy_R
    for t in range(len(inputs.log_probs_R)):
        log_p, log_old, a = (float(x[t]) for x in (inputs.log_probs_R, inputs.old_log_probs_R, inputs.advantages_R))
        ratio = math.exp(log_p - log_old)
        clipped = min(max(ratio, 1 - options.eps_clip), 1 + options.eps_clip_high)
        objective = min(ratio * a, clipped * a)
        if options.eps_clip_c is not None and a < 0:
            objective = max(objective, options.eps_clip_c * a)
        if inputs.weighted_R is not None and inputs.weighted_R[t]:
            assert rollout is not None
            weight = math.exp(log_old - float(rollout[t]))
            bounded = min(max(weight, options.tis_clip_low), options.tis_clip)
            objective *= 0 if options.offpolicy_correction == "mis" and bounded != weight else bounded
        if options.kl_loss_coef:
            assert ref is not None
            r = math.exp(float(ref[t]) - log_p)
            kl = {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": r - 1 - math.log(r)}
            bound = math.inf if options.kl_clamp is None else options.kl_clamp
            estimate = kl[options.kl_loss_type.replace("low_var_kl", "k3")]
            objective -= options.kl_loss_coef * min(max(estimate, -bound), bound)
        if options.entropy_coef:
            assert entropy is not None
            objective += options.entropy_coef * float(entropy[t])
        result.append(-objective)
    return result


VARIANTS: dict[str, dict[str, Any]] = {
    "clip-higher": {},
    "symmetric clip": {"eps_clip_high": 0.2},
    "dual clip": {"eps_clip_c": 1.3},
    "k1": {"kl_loss_coef": 0.1, "kl_loss_type": "k1"},
    "k2": {"kl_loss_coef": 0.1, "kl_loss_type": "k2"},
    "k3": {"kl_loss_coef": 0.1, "kl_loss_type": "k3"},
    "low_var_kl": {"kl_loss_coef": 0.1},
    "k1, bounded": {"kl_loss_coef": 0.1, "kl_loss_type": "k1", "kl_clamp": 0.3},
    "k2, bounded": {"kl_loss_coef": 0.1, "kl_loss_type": "k2", "kl_clamp": 0.3},
    "low_var_kl, bounded": {"kl_loss_coef": 0.1, "kl_clamp": 0.3},
    "entropy": {"entropy_coef": 0.05},
    "TIS": {"tis_clip": 1.5, "tis_clip_low": 0.6},
    "MIS": {"tis_clip": 1.5, "tis_clip_low": 0.6, "offpolicy_correction": "mis"},
    "TIS of some": {"tis_clip": 1.5, "tis_clip_low": 0.6},
    "all": {"eps_clip_c": 1.3, "kl_loss_coef": 0.1, "entropy_coef": 0.05, "tis_clip": 1.5},
}
EVERY, THIRD = torch.ones(64, dtype=torch.bool), torch.arange(64) % 3 == 0
WEIGHTED = {"TIS": EVERY, "MIS": EVERY, "TIS of some": THIRD, "all": EVERY}


def variant(name: str) -> tuple[LossInputs, LossOptions]:
    return make_inputs(weighted_R=WEIGHTED.get(name)), replace(OPTIONS, **VARIANTS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_policy_loss_matches_the_papers(name: str) -> None:
    inputs, options = variant(name)
    loss, _ = policy_loss(inputs, options)
    assert loss.tolist() == pytest.approx(by_the_papers(inputs, options), rel=1e-12, abs=1e-12)


def test_every_variant_changes_the_loss() -> None:
    """Control of the test above: the inputs reach every branch, so no two formulas agree on them."""
    losses = {name: policy_loss(*variant(name))[0] for name in VARIANTS}
    same = [
        (a, b)
        for a in losses
        for b in losses
        if a < b and torch.allclose(losses[a], losses[b]) and {a, b} != {"k3", "low_var_kl"}
    ]
    assert same == []


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_against_finite_differences(name: str) -> None:
    inputs, options = variant(name)

    def loss(log_probs: Tensor, entropy: Tensor) -> Tensor:
        return policy_loss(replace(inputs, log_probs_R=log_probs, entropy_R=entropy), options)[0].sum()

    assert inputs.entropy_R is not None
    points = (inputs.log_probs_R.clone().requires_grad_(), inputs.entropy_R.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, points, eps=1e-7, atol=1e-5)


def test_metrics_and_weights_have_no_gradient() -> None:
    inputs, options = variant("TIS")
    assert inputs.rollout_log_probs_R is not None
    rollout = inputs.rollout_log_probs_R.clone().requires_grad_()
    log_probs = inputs.log_probs_R.clone().requires_grad_()
    inputs = replace(inputs, log_probs_R=log_probs, rollout_log_probs_R=rollout)
    loss, metrics = policy_loss(inputs, options)
    loss.sum().backward()
    assert log_probs.grad is not None and rollout.grad is None
    assert all(not metrics[name].requires_grad for name in ("clip_fraction", "ppo_kl", "pg_loss", "kl", "tis_weight"))


def test_on_policy_the_gradient_is_reinforce() -> None:
    """At ratio 1 nothing is clipped, and the gradient of -A log p is -A."""
    inputs = make_inputs()
    log_probs = inputs.log_probs_R.clone().requires_grad_()
    loss, metrics = policy_loss(replace(inputs, log_probs_R=log_probs, old_log_probs_R=log_probs.detach()), OPTIONS)
    loss.sum().backward()
    assert torch.equal(loss, -inputs.advantages_R)
    assert log_probs.grad is not None and torch.equal(log_probs.grad, -inputs.advantages_R)
    assert metrics["clip_fraction"].sum() == 0
    assert policy_loss(inputs, OPTIONS)[1]["clip_fraction"].sum() > 0


def test_clipped_tokens_have_no_gradient() -> None:
    """A ratio is clipped above 1 + 0.28 if A > 0 and below 1 - 0.2 if A < 0; clip-higher leaves 1.25 unclipped."""
    ratios = torch.tensor([1.3, 1.25, 0.7, 1.3, 0.7]).double()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0]).double()
    log_probs = ratios.log().requires_grad_()
    inputs = LossInputs(log_probs, torch.zeros(5).double(), advantages)
    for high, expected in ((0.28, [0, -1.25, 0, 1.3, -0.7]), (0.2, [0, 0, 0, 1.3, -0.7])):
        loss, metrics = policy_loss(inputs, replace(OPTIONS, eps_clip_high=high))
        (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
        assert gradient.tolist() == pytest.approx(expected)
        assert metrics["clip_fraction"].tolist() == [float(g == 0) for g in expected]


def kl_gradients(log_ratios: list[float], options: LossOptions) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Return loss, gradient and metrics of the KL term for tokens with these log(p_ref / p); float32 as in training."""
    log_probs = torch.full((len(log_ratios),), -5.0, requires_grad=True)
    ref = log_probs.detach() + torch.tensor(log_ratios)
    inputs = LossInputs(log_probs, log_probs.detach(), torch.zeros(len(log_ratios)), ref_log_probs_R=ref)
    loss, metrics = policy_loss(inputs, options)
    loss.sum().backward()
    assert log_probs.grad is not None
    return loss.tolist(), log_probs.grad.tolist(), metrics


def test_tokens_beyond_the_kl_bound_have_no_gradient() -> None:
    """k3 has the gradient 1 - r, which is -147 at a log-ratio of 5; beyond e**88 float32 gives nan."""
    plain = replace(OPTIONS, kl_loss_coef=1.0, kl_clamp=None)
    _, gradients, metrics = kl_gradients([5.0, 1.0], plain)
    assert gradients == pytest.approx([1 - math.exp(5), 1 - math.e]) and "kl_clamp_fraction" not in metrics
    assert not math.isfinite(kl_gradients([200.0], plain)[1][0])
    log_ratios = [5.0, 2.7, 2.5, 1.0, -10.9, -11.1, 200.0]
    loss, gradients, metrics = kl_gradients(log_ratios, replace(plain, kl_clamp=10.0))
    inside = [math.exp(x) - 1 - x for x in (2.5, 1.0, -10.9)]
    assert loss == pytest.approx([10.0, 10.0, *inside, 10.0, 10.0], rel=1e-5)
    assert gradients == pytest.approx([0, 0, *(1 - math.exp(x) for x in (2.5, 1.0, -10.9)), 0, 0], rel=1e-5)
    assert metrics["kl_clamp_fraction"].tolist() == [1, 1, 0, 0, 0, 1, 1]
    signed = replace(plain, kl_loss_type="k1", kl_clamp=2.0)
    assert kl_gradients([3.0, 1.0, -3.0], signed)[:2] == ([-2.0, -1.0, 2.0], [0.0, 1.0, 0.0])


def test_metrics_follow_the_given_inputs() -> None:
    bare = make_inputs(ref_log_probs_R=None, rollout_log_probs_R=None, entropy_R=None)
    assert set(policy_loss(bare, OPTIONS)[1]) == {"clip_fraction", "ppo_kl", "pg_loss"}
    inputs = make_inputs()
    loss, metrics = policy_loss(inputs, OPTIONS)
    assert {"kl", "entropy"} < set(metrics)
    assert torch.equal(loss, metrics["pg_loss"]), "coefficients of 0 add nothing to the loss"
    assert all(value.shape == loss.shape for value in metrics.values())


def test_every_metric_has_its_value() -> None:
    """Compute every metric of `policy_loss` by hand, token by token; its sign, its range and its reference count."""
    inputs, options = variant("all")
    options = replace(options, kl_clamp=0.3)
    weighted = torch.arange(64) % 2 == 0
    inputs = replace(inputs, weighted_R=weighted)
    assert inputs.ref_log_probs_R is not None and inputs.rollout_log_probs_R is not None
    assert inputs.entropy_R is not None and options.eps_clip_c is not None
    expected: dict[str, list[float]] = {}

    def put(**values: float) -> None:
        for name, value in values.items():
            expected.setdefault(name, []).append(value)

    for t in range(64):
        log_p, log_old, ref, rollout = (
            float(x[t])
            for x in (inputs.log_probs_R, inputs.old_log_probs_R, inputs.ref_log_probs_R, inputs.rollout_log_probs_R)
        )
        a, ratio, k3 = float(inputs.advantages_R[t]), math.exp(log_p - log_old), math.expm1(ref - log_p) - (ref - log_p)
        clipped = max(-a * ratio, -a * min(max(ratio, 0.8), 1.28))
        loss = min(clipped, -1.3 * a) if a < 0 else clipped
        weight = math.exp(log_old - rollout)
        put(
            clip_fraction=float(ratio > 1.28 if a > 0 else ratio < 0.8),
            dual_clip_fraction=float(a < 0 and ratio > 1.3),
            ppo_kl=log_old - log_p,
            tis_weight=min(weight, 1.5) if weighted[t] else 1.0,
            tis_clipped=float(bool(weighted[t]) and weight > 1.5),
            pg_loss=loss * (min(weight, 1.5) if weighted[t] else 1.0),
            kl=min(k3, 0.3),
            kl_clamp_fraction=float(k3 > 0.3),
            entropy=float(inputs.entropy_R[t]),
        )
    _, metrics = policy_loss(inputs, options)
    assert metrics.keys() == expected.keys()
    for name, values in metrics.items():
        assert values.tolist() == pytest.approx(expected[name], rel=1e-12, abs=1e-14), name
    for name in ("clip_fraction", "dual_clip_fraction", "tis_clipped", "kl_clamp_fraction"):
        assert 0 < sum(expected[name]) < 64, f"the inputs reach both sides of {name}"


def test_ppo_kl_is_positive_for_less_likely_tokens() -> None:
    """The metric estimates KL(old || current): the old policy sampled, so it is log p_old - log p."""
    inputs = LossInputs(torch.tensor([-3.0, -1.0]), torch.tensor([-2.0, -2.0]), torch.ones(2))
    assert policy_loss(inputs, OPTIONS)[1]["ppo_kl"].tolist() == [1.0, -1.0]


def test_sft_loss_is_the_negative_log_likelihood() -> None:
    inputs = make_inputs()
    loss, metrics = sft_loss(inputs, OPTIONS)
    assert torch.equal(loss, -inputs.log_probs_R) and metrics == {}
    assert set(LOSSES) == {"policy_loss", "sft_loss"}
