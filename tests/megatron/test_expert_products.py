"""The products of all experts at once: grouped and loop against plain linear layers, and stacked weights by name."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slime.megatron.model.expert_products import Groups, expert_linear, why_not_grouped
from slime.megatron.model.stacked_experts import of_each_expert, run_experts

COUNTS = (0, 3, 1, 0, 5, 0)
HIDDEN, FFN = 16, 8


def draw() -> list[Tensor]:
    """Return tokens, router weights, both matrices, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    experts, tokens = len(COUNTS), sum(COUNTS)
    shapes = ((tokens, HIDDEN), (tokens,), (experts, 2 * FFN, HIDDEN), (experts, HIDDEN, FFN), (tokens, HIDDEN))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def with_gradients(function: Any, leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def by_hand(tokens: Tensor, weights: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Run the experts as separate layers; one without tokens takes part too, so that its gradient is zero."""
    outputs: list[Tensor] = []
    for part, weight, up, down in zip(tokens.split(COUNTS), weights.split(COUNTS), first, second, strict=True):
        gate, value = F.linear(part, up).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * value * weight[:, None], down))
    return torch.cat(outputs)


@pytest.mark.parametrize("grouped", [False, True])
def test_experts_match_separate_layers(grouped: bool) -> None:
    *leaves, upstream = draw()
    groups = Groups.of(torch.tensor(COUNTS), torch.device("cpu"), grouped=grouped)
    assert (groups.counts is None) == grouped
    expected = with_gradients(by_hand, leaves, upstream)
    found = with_gradients(partial(run_experts, groups=groups), leaves, upstream)
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    shifted = Groups.of(torch.tensor([1, *COUNTS[1:4], COUNTS[4] - 1, 0]), torch.device("cpu"), grouped=grouped)
    wrong = with_gradients(partial(run_experts, groups=shifted), leaves, upstream)
    assert all((ours - exact).abs().max() > 1e-2 for ours, exact in zip(wrong, expected, strict=True))


@pytest.mark.parametrize("grouped", [False, True])
def test_bf16_gradients_are_added_to_buffers(grouped: bool) -> None:
    """Two backward passes add up in fp32 with what the buffer held, and the wrapper does not add them again."""
    tokens, _, first, _, _ = draw()
    weight: Any = torch.nn.Parameter(first.bfloat16())
    weight.main_grad = torch.ones_like(first)
    groups = Groups.of(torch.tensor(COUNTS), torch.device("cpu"), grouped=grouped)
    tokens = tokens.bfloat16()
    for _ in range(2):
        expert_linear(tokens, weight, groups).sum().backward()
    assert weight.grad_added_to_main_grad
    sums = torch.stack([part.float().sum(0) for part in tokens.split(COUNTS)])
    expected = 1 + 2 * sums[:, None].expand_as(first)
    assert (weight.main_grad - expected).abs().max() <= 2 * 2.0**-8 * sums.abs().max()
    assert (weight.main_grad[COUNTS.index(0)] == 1).all()


@pytest.mark.parametrize("grouped", [False, True])
def test_a_rank_without_tokens_has_gradients(grouped: bool) -> None:
    _, _, first, second, _ = draw()
    groups = Groups.of(torch.zeros(len(COUNTS), dtype=torch.int64), torch.device("cpu"), grouped=grouped)
    leaves = [torch.zeros(0, HIDDEN), torch.zeros(0), first, second]
    out, *gradients = with_gradients(partial(run_experts, groups=groups), leaves, torch.zeros(0, HIDDEN))
    assert out.shape == (0, HIDDEN)
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in leaves]
    assert not any(gradient.any() for gradient in gradients)


def test_a_cpu_names_its_reason() -> None:
    assert why_not_grouped(torch.bfloat16, (16, 16)) == "a CPU has no grouped matrix product"


def test_parts_share_memory_with_the_parameter() -> None:
    stacked: Any = torch.nn.Parameter(torch.zeros(2, 3, 4))
    stacked.main_grad, stacked.grad = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    parts: dict[str, Any] = dict(of_each_expert("mlp.experts.linear_fc2", stacked))
    assert list(parts) == [f"mlp.experts.local_experts.{expert}.linear_fc2.weight" for expert in (0, 1)]
    second = parts["mlp.experts.local_experts.1.linear_fc2.weight"]
    for number, tensor in enumerate((second, second.grad, second.main_grad), start=1):
        tensor.fill_(number)
    whole = (stacked.detach(), stacked.grad, stacked.main_grad)
    assert [tensor.flatten(1).mean(1).tolist() for tensor in whole] == [[0, 1], [0, 2], [0, 3]]
    shared = torch.nn.Parameter(torch.zeros(3, 4))
    [(name, same)] = of_each_expert("mlp.shared_experts.linear_fc1.weight", shared)
    assert name == "mlp.shared_experts.linear_fc1.weight" and same is shared
