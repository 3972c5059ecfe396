"""Kernels on a CPU, against PyTorch in float64: norm, gate, the split of the QKV projection, the sum with its norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slime.megatron.model.kernels import add_and_norm, cpu, rms_norm, split_heads, swiglu

TOLERANCE = 1e-6
EPS = 1e-5


def inputs(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def with_gradients(function: Callable[..., Tensor], *tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the output, and the gradient of each input for a random gradient of the output."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs(*out.shape, seed=9).to(dtype))]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def reference_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), weight, EPS)


def reference_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("shape", [(300, 1, 128), (50, 1, 4, 32), (1, 8)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0], ids="{:g}".format)
def test_rms_norm_matches_pytorch(shape: tuple[int, ...], scale: float) -> None:
    """At a scale of 1e-3 the epsilon decides; the rows of several heads follow each other, as in q and k norms."""
    x, weight = inputs(*shape, scale=scale), 1 + inputs(shape[-1], seed=1) / 4
    found = with_gradients(lambda x, w: rms_norm(x, w, EPS), x, weight, dtype=torch.float32)
    expected = with_gradients(reference_norm, x, weight, dtype=torch.float64)
    assert difference(found, expected) < TOLERANCE
    other_epsilon = with_gradients(lambda x, w: rms_norm(x, w, 2e-5), x, weight, dtype=torch.float32)
    assert scale > 1 or difference(other_epsilon, expected) > TOLERANCE


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0], ids="{:g}".format)
def test_swiglu_matches_pytorch(scale: float) -> None:
    gate_up = inputs(300, 1, 96, scale=scale)
    found = with_gradients(swiglu, gate_up, dtype=torch.float32)
    expected = with_gradients(reference_gate, gate_up, dtype=torch.float64)
    assert difference(found, expected) < TOLERANCE
    swapped = with_gradients(lambda x: swiglu(x.roll(48, -1)), gate_up, dtype=torch.float32)
    assert scale < 1 or difference(swapped, expected) > 0.1  # small gates: silu(gate) up = gate up / 2


def test_gradients_pass_gradcheck() -> None:
    x, weight = inputs(5, 1, 8).double().requires_grad_(), inputs(8, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: cpu.rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(cpu.swiglu, (x,))


def test_views_and_expanded_gradients() -> None:
    """Use what attention passes in: slices of a larger tensor, and gradients without memory of their own."""
    whole, weight = inputs(40, 1, 6, 32), 1 + inputs(32, seed=1) / 4

    def total(norm: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda x, w: norm(x[:, :, 1:3], w).sum(-1)

    found = with_gradients(total(lambda x, w: rms_norm(x, w, EPS)), whole, weight, dtype=torch.float32)
    expected = with_gradients(total(reference_norm), whole, weight, dtype=torch.float64)
    assert difference(found, expected) < TOLERANCE


def test_other_dtypes_use_pytorch() -> None:
    x, weight = inputs(20, 1, 64).bfloat16(), inputs(64, seed=1).bfloat16()
    assert torch.equal(rms_norm(x, weight, EPS), reference_norm(x, weight))
    assert torch.equal(swiglu(x), reference_gate(x))


def reference_heads(mixed: Tensor, angles: Tensor, weights: list[Tensor], groups: int, interleaved: bool) -> Tensor:
    """Return q, k and v of a projection's output, in one row per token."""
    half, channels = angles.size(1), 16
    of_groups = mixed.unflatten(1, (groups, -1, channels))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    found = [of_groups[:, :, :-2].flatten(1, 2), of_groups[:, :, -2], of_groups[:, :, -1]]
    for part, weight in enumerate(weights):
        found[part] = reference_norm(found[part], weight)
    for part in range(2):
        turning, rest = found[part][..., : 2 * half], found[part][..., 2 * half :]
        x1, x2 = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
        pair = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        found[part] = torch.cat([turned, rest], -1)
    return torch.cat([part.flatten(1) for part in found], 1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norms", [0, 2])
@pytest.mark.parametrize(("heads", "groups", "half"), [(6, 2, 4), (3, 3, 8), (4, 1, 8)])
def test_heads_match_their_formula(heads: int, groups: int, half: int, norms: int, interleaved: bool) -> None:
    mixed, angles = inputs(20, (heads + 2 * groups) * 16), inputs(20, half, scale=3.0, seed=1).double()
    weights = [1 + inputs(16, seed=seed) / 4 for seed in range(2, 2 + norms)]

    def ours(mixed: Tensor, *weights: Tensor, count: int = groups) -> Tensor:
        q, k, v = split_heads(
            mixed,
            angles.cos().to(mixed.dtype),
            angles.sin().to(mixed.dtype),
            (weights[0], weights[1]) if weights else None,
            num_heads=heads * count // groups,
            num_groups=count,
            eps=EPS,
            interleaved=interleaved,
        )
        return torch.cat([part.flatten(1) for part in (q, k, v)], 1)

    found = with_gradients(ours, mixed, *weights, dtype=torch.float32)
    expected = with_gradients(
        lambda mixed, *weights: reference_heads(mixed, angles, [*weights], groups, interleaved),
        mixed,
        *weights,
        dtype=torch.float64,
    )
    assert difference(found, expected) < TOLERANCE
    if groups > 1 and heads > groups:  # control: all query heads first, then keys, then values
        of_groups = mixed.unflatten(1, (groups, -1, 16))
        in_order = torch.cat(
            [of_groups[:, :, :-2].flatten(1), *of_groups[:, :, -2:].transpose(1, 2).flatten(2).unbind(1)], 1
        )
        assert difference([ours(in_order, *weights)], expected[:1]) > 0.1


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("following", [False, True])
def test_sum_matches_its_formula(own: bool, following: bool) -> None:
    x, residual = inputs(30, 1, 64), inputs(30, 1, 64, seed=1)
    weights = [1 + inputs(64, seed=seed) / 4 for seed in range(2, 2 + own + following)]

    def with_norm(function: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., Tensor]:
        def both(x: Tensor, residual: Tensor, *weights: Tensor) -> Tensor:
            total, normed = function(x, residual, weights[0] if own else None, weights[-1] if following else None)
            assert (normed is not None) == following
            return torch.stack([total] if normed is None else [total, normed])

        return both

    def reference(x: Tensor, residual: Tensor, own: Tensor | None, following: Tensor | None) -> Any:
        total = residual + (x if own is None else reference_norm(x, own))
        return total, None if following is None else reference_norm(total, following)

    found = with_gradients(
        with_norm(lambda x, residual, *w: add_and_norm(x, residual, w[0], w[1], EPS)),
        x,
        residual,
        *weights,
        dtype=torch.float32,
    )
    expected = with_gradients(with_norm(reference), x, residual, *weights, dtype=torch.float64)
    assert difference(found, expected) < TOLERANCE
    if weights:  # control
        other = with_gradients(with_norm(reference), x, residual, *(w.flip(0) for w in weights), dtype=torch.float64)
        assert difference(found, other) > 0.01
