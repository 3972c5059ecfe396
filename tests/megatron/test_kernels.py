"""Norm and gate with their own backward passes, against PyTorch in float64; and that the model really uses them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slime.megatron.model.kernels import cpu, rms_norm, swiglu

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
