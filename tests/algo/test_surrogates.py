"""GSPO, CISPO and Dr. GRPO's losses against their papers, in loops, with gradients by autograd.

A paper writes its objective over whole responses with its own denominator; ours is the sum of loss weights x per-token
losses. These tests compare the two sums, and the gradient of each log-prob.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slime.algo.losses import LossInputs, LossOptions, policy_loss
from slime.algo.reducers import loss_weights
from slime.algo.sequences import Sequences
from slime.algo.surrogates import clipped, weighted_log_probs

LENGTHS = [3, 9, 1, 0, 6, 4, 5]
"""The fourth response has no tokens, and the sixth has none that counts."""
OPTIONS = LossOptions(
    surrogate="token",
    eps_clip=0.1,
    eps_clip_high=0.15,
    eps_clip_c=None,
    kl_loss_coef=0.0,
    kl_loss_type="k3",
    entropy_coef=0.0,
    offpolicy_correction="tis",
    tis_clip=2.0,
    tis_clip_low=0.0,
)


def make_inputs(seed: int = 0, scale: float = 0.15) -> LossInputs:
    """Return sequence ratios on both sides of both clip bounds, with one advantage of either sign for each response."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    num_tokens = sum(LENGTHS)
    row_R = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    old = -draw(num_tokens).abs() - 1
    mask = (torch.rand(num_tokens, generator=generator) < 0.8).double()
    mask[row_R == 5] = 0
    mask[row_R == 2] = 1
    shift = torch.tensor([0.4, -0.4, 0.5, 0.0, -0.4, 0.1, 0.01], dtype=torch.float64)
    return LossInputs(
        log_probs_R=old + scale * draw(num_tokens) + shift[row_R],
        old_log_probs_R=old,
        advantages_R=torch.tensor([1.2, 0.7, -0.4, 1.0, -1.5, 2.0, 0.8], dtype=torch.float64)[row_R],
        rollout_log_probs_R=old + 0.3 * draw(num_tokens),
        loss_mask_R=mask,
        sequences=Sequences(row_R, len(LENGTHS)),
    )


def responses(inputs: LossInputs) -> list[list[int]]:
    """Return the tokens that count, for each response that has any."""
    assert inputs.loss_mask_R is not None and inputs.sequences is not None
    rows, mask = inputs.sequences.row_R.tolist(), inputs.loss_mask_R.tolist()
    found = [[t for t in range(len(rows)) if rows[t] == row and mask[t]] for row in range(len(LENGTHS))]
    return [tokens for tokens in found if tokens]


def ours(inputs: LossInputs, options: LossOptions, *, per_token: bool) -> tuple[Tensor, Tensor]:
    """Return the loss of the step, and its gradient with respect to each log-prob."""
    log_probs = inputs.log_probs_R.clone().requires_grad_()
    loss_R, metrics = policy_loss(replace(inputs, log_probs_R=log_probs), options)
    assert not any(values.requires_grad for values in metrics.values())
    assert inputs.loss_mask_R is not None
    counted = torch.ones(len(LENGTHS), dtype=torch.bool)
    weights = loss_weights(inputs.loss_mask_R, torch.tensor(LENGTHS), counted, per_token=per_token)
    loss = (weights * loss_R).sum()
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


def papers(objective: Any, inputs: LossInputs, **options: Any) -> tuple[Tensor, Tensor]:
    log_probs = inputs.log_probs_R.clone().requires_grad_()
    loss = -objective(replace(inputs, log_probs_R=log_probs), **options)
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def gspo(
    inputs: LossInputs, *, low: float, high: float, ceiling: float | None = None, by_length: bool = True
) -> Tensor:
    """Eqs. 5 and 7: the mean over responses of min(s A, clip(s) A), with s = (p / p_old)^(1 / length)."""
    total = zero()
    for tokens in responses(inputs):
        log_s = zero()
        for t in tokens:
            log_s = log_s + inputs.log_probs_R[t] - inputs.old_log_probs_R[t]
        s = (log_s / len(tokens) if by_length else log_s).exp()
        advantage = inputs.advantages_R[tokens[0]]
        value = torch.minimum(s * advantage, s.clamp(low, high) * advantage)
        if ceiling is not None and advantage < 0:
            value = torch.maximum(value, ceiling * advantage)
        total = total + value
    return total / len(responses(inputs))


def cispo(inputs: LossInputs, *, low: float, high: float, stop: bool = True) -> Tensor:
    """MiniMax-M1 eqs. 4 and 5: 1 / (number of all tokens) x the sum of sg(clip(r)) A log p."""
    total, count = zero(), 0
    for tokens in responses(inputs):
        for t in tokens:
            weight = (inputs.log_probs_R[t] - inputs.old_log_probs_R[t]).exp().clamp(low, high)
            total = total + (weight.detach() if stop else weight) * inputs.advantages_R[t] * inputs.log_probs_R[t]
            count += 1
    return total / count


def dr_grpo(inputs: LossInputs, *, longest: int) -> Tensor:
    """arXiv:2503.20783: divide by a constant, the longest length, instead of by each response's own length."""
    total = zero()
    for tokens in responses(inputs):
        for t in tokens:
            ratio, advantage = (inputs.log_probs_R[t] - inputs.old_log_probs_R[t]).exp(), inputs.advantages_R[t]
            total = total + torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.15) * advantage) / longest
    return total / len(responses(inputs))


def difference(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("ceiling", [None, 1.2])
def test_gspo(ceiling: float | None) -> None:
    options = replace(OPTIONS, surrogate="sequence", eps_clip_c=ceiling)
    clipped = 0.0
    for seed in range(3):
        inputs = make_inputs(seed)
        expected = papers(gspo, inputs, low=0.9, high=1.15, ceiling=ceiling)
        assert difference(ours(inputs, options, per_token=False), expected) < 1e-12
        clipped += float(policy_loss(inputs, options)[1]["clip_fraction"].sum())
        # controls: the whole ratio without the root, a token's own ratio, no clip, another denominator
        assert difference(papers(gspo, inputs, low=0.9, high=1.15, ceiling=ceiling, by_length=False), expected) > 0.01
        assert difference(ours(inputs, replace(options, surrogate="token"), per_token=False), expected) > 0.01
        assert difference(papers(gspo, inputs, low=0.0, high=9.0), expected) > 0.01
        assert difference(ours(inputs, options, per_token=True), expected) > 0.01
    assert clipped > 0
    if ceiling is not None:
        assert difference(expected, papers(gspo, inputs, low=0.9, high=1.15)) > 0.01


def test_gspo_clips_whole_responses() -> None:
    """All tokens of a response have a gradient or none has, while token ratios clip some of them."""
    inputs = make_inputs(scale=0.4)
    gradient = ours(inputs, replace(OPTIONS, surrogate="sequence"), per_token=False)[1]
    kinds = [{bool(gradient[t]) for t in tokens} for tokens in responses(inputs)]
    assert {True} in kinds and {False} in kinds and {True, False} not in kinds
    by_token = ours(inputs, OPTIONS, per_token=False)[1]
    assert any({bool(by_token[t]) for t in tokens} == {True, False} for tokens in responses(inputs))


@pytest.mark.parametrize("low", [0.9, 0.0])
def test_cispo(low: float) -> None:
    """`low` 0, which is --eps-clip 1, bounds weights from above only, as the paper does."""
    options = replace(OPTIONS, surrogate="cispo", eps_clip=1 - low)
    for seed in range(3):
        inputs = make_inputs(seed)
        expected = papers(cispo, inputs, low=low, high=1.15)
        found = ours(inputs, options, per_token=True)
        assert difference(found, expected) < 1e-12
        assert all(bool(found[1][t]) for tokens in responses(inputs) for t in tokens), "no token loses its gradient"
        # controls: a gradient through the weight, the other range, the clipped objective
        assert difference(papers(cispo, inputs, low=low, high=1.15, stop=False), expected) > 0.01
        assert difference(papers(cispo, inputs, low=0.9 - low, high=1.15), expected) > 0.01
        assert difference(ours(inputs, replace(options, surrogate="token"), per_token=True), expected) > 0.01


def test_dr_grpo_is_a_scaled_per_token_loss() -> None:
    """The factor is mean length / longest length: tokens of one step do not differ. DAPO's loss is the same."""
    inputs = make_inputs()
    num_tokens, num_responses = sum(map(len, responses(inputs))), len(responses(inputs))
    loss, gradient = papers(dr_grpo, inputs, longest=64)
    factor = 64 * num_responses / num_tokens
    assert difference(ours(inputs, OPTIONS, per_token=True), (factor * loss, factor * gradient)) < 1e-12
    by_response = ours(inputs, OPTIONS, per_token=False)[1]
    assert (by_response / gradient)[gradient != 0].std() > 1  # control: not one common factor


@pytest.mark.parametrize("surrogate", ["token", "sequence", "cispo"])
def test_on_policy_all_give_the_policy_gradient(surrogate: Any) -> None:
    """With old = current policy, detached, the gradient is -A on each token, also for GSPO's sequence ratio."""
    inputs = make_inputs()
    log_probs = inputs.log_probs_R.clone().requires_grad_()
    on_policy = replace(inputs, log_probs_R=log_probs, old_log_probs_R=log_probs.detach())
    loss_R, metrics = policy_loss(on_policy, replace(OPTIONS, surrogate=surrogate))
    (gradient,) = torch.autograd.grad(loss_R.sum(), log_probs)
    assert torch.allclose(gradient, -inputs.advantages_R, rtol=1e-12)
    assert not metrics["clip_fraction"].any() and not metrics["ppo_kl"].any()
    assert metrics.keys() == {"clip_fraction", "ppo_kl", "pg_loss"}


@pytest.mark.parametrize("surrogate", ["sequence", "cispo"])
def test_importance_weights_multiply_every_surrogate(surrogate: Any) -> None:
    inputs, options = make_inputs(), replace(OPTIONS, surrogate=surrogate)
    weighted = torch.arange(len(inputs.log_probs_R)) % 2 == 0
    plain, _ = policy_loss(inputs, options)
    loss, _ = policy_loss(replace(inputs, weighted_R=weighted), options)
    assert inputs.rollout_log_probs_R is not None
    weights = (inputs.old_log_probs_R - inputs.rollout_log_probs_R).exp().clamp(0, 2)
    assert torch.allclose(loss, torch.where(weighted, weights * plain, plain), rtol=1e-12)


# --- sums over responses ----------------------------------------------------------------------------------------


def test_clip_fractions_count_the_clipped_tokens() -> None:
    """The ratio of 5 is clipped for A > 0 and dual-clipped for A < 0; inside the range nothing is."""
    ratio, advantages = torch.tensor([5.0, 5.0, 0.1, 0.1, 1.0, 1.0]), torch.tensor([1.0, -1, 1, -1, 1, -1])
    loss, metrics = clipped(ratio, advantages, low=0.8, high=1.2, ceiling=3.0)
    assert loss.tolist() == pytest.approx([-1.2, 3.0, -0.1, 0.8, -1.0, 1.0])
    assert metrics["clip_fraction"].tolist() == [1, 0, 0, 1, 0, 0]
    assert metrics["dual_clip_fraction"].tolist() == [0, 1, 0, 0, 0, 0]
    loss, metrics = clipped(ratio, advantages, low=0.8, high=1.2, ceiling=None)
    assert loss[1] == 5.0 and metrics.keys() == {"clip_fraction"}
    _, metrics = weighted_log_probs(ratio.log(), ratio, advantages, low=0.8, high=1.2)
    assert metrics["clip_fraction"].tolist() == [1, 1, 1, 1, 0, 0]


def test_sums_and_means_of_responses() -> None:
    inputs = make_inputs()
    sequences, mask = inputs.sequences, inputs.loss_mask_R
    assert sequences is not None and mask is not None
    values = torch.where(mask != 0, inputs.log_probs_R, float("nan"))  # masked values may be anything
    sums, means = sequences.sum_of(values, mask), sequences.mean_of(values, mask)
    row = sequences.row_R.tolist()
    for t in range(len(row)):
        kept = [float(values[s]) for s in range(len(row)) if row[s] == row[t] and mask[s]]
        assert float(sums[t]) == pytest.approx(sum(kept))
        assert float(means[t]) == pytest.approx(sum(kept) / max(len(kept), 1))
    nothing = Sequences(torch.zeros(0, dtype=torch.int64), 0)
    assert len(nothing.mean_of(torch.zeros(0), torch.zeros(0))) == 0


def test_gradients_of_sums_and_means() -> None:
    inputs = make_inputs()
    sequences, mask = inputs.sequences, inputs.loss_mask_R
    assert sequences is not None and mask is not None
    for function in (sequences.sum_of, sequences.mean_of):
        values = inputs.log_probs_R.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda v, f=function: f(v, mask).sin(), (values,))
