"""Tokens on their way to experts and back: the order of Megatron's dispatcher, sums by hand, and gradients."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import permute, unpermute

from slime.megatron.model.local_dispatch import Order, sorted_by_expert, summed_by_token
from slime.megatron.model.moe import replayed

TOKENS, EXPERTS, TOP_K, HIDDEN = 7, 5, 3, 4


def routed(seed: int = 0) -> torch.Tensor:
    scores = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed))
    scores[:, 2] = -1.0  # an expert without tokens
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(TOP_K, dim=1).indices, True)


def test_the_order_is_that_of_megatron() -> None:
    tokens, weights = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, EXPERTS)
    order = Order.of(routed(), TOP_K)
    rows, of_rows, token_of = permute(tokens, routed(), probs=weights, num_out_tokens=TOKENS * TOP_K)
    assert torch.equal(order.token_of, token_of)
    assert torch.equal(sorted_by_expert(tokens, order), rows)
    assert of_rows is not None and torch.equal(weights.flatten().index_select(0, order.entries), of_rows)
    summed = unpermute(rows, token_of, restore_shape=tokens.shape)
    torch.testing.assert_close(summed_by_token(rows, order), summed)
    other = Order.of(routed(seed=1), TOP_K)
    assert not torch.equal(sorted_by_expert(tokens, other), rows)


def test_gradients_match_finite_differences() -> None:
    order = Order.of(routed(), TOP_K)
    tokens = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(TOKENS * TOP_K, HIDDEN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sorted_by_expert(x, order), (tokens,))
    assert torch.autograd.gradcheck(lambda x: summed_by_token(x, order), (rows,))
    wrong = Order(order.entries, order.token_of, order.rows_of.roll(1, 0))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x: sorted_by_expert(x, wrong), (tokens,))


def test_an_expert_given_twice_is_not_replayed() -> None:
    chosen = torch.tensor([[0, 1, 2]]).expand(4, 3)
    given = torch.tensor([[4, 3, 1], [4, 3, 4], [-1, -1, -1], [1, -1, 3]], dtype=torch.int16)
    assert replayed(given, chosen).tolist() == [[4, 3, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert replayed(given[:, :2], chosen[:, :2]).tolist() == [[4, 3], [4, 3], [0, 1], [0, 1]]
