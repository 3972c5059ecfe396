"""The input of every estimator: rewards, groups and masks of a whole rollout, and how rewards are assigned to tokens.

- Used by: `megatron.advantages` makes one from the batch's columns; the estimators in this folder read it.
- Invariant: a sample whose reward failed (nan) and a token that the mask leaves out have no influence on anything.

Everything is computed in float64.

_G: the samples of one group; groups may differ in size. _L: a sample's counted tokens, in order and without gaps for
the tokens that the mask leaves out, padded with 0 at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AdvantageOptions:
    """The values of the flags with the same names."""

    normalize_std: bool = True
    """The opposite of --disable-grpo-std-normalization."""
    kl_coef: float = 0.0
    kl_clamp: float | None = None
    """The bound of a token's KL in the reward; None means no bound."""
    gamma: float = 1.0
    lambd: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RolloutRewards:
    """The rewards of all samples of a rollout, and operations between its axes.

    Example: two samples of one group, with 2 and 3 response tokens; the second token of sample 1 comes from a tool.

    >>> import torch
    >>> rollout = RolloutRewards(
    ...     rewards_N=torch.tensor([1.0, 0.0]),
    ...     group_indices_N=torch.tensor([0, 0]),
    ...     counted_N=torch.tensor([True, True]),
    ...     response_lengths_N=torch.tensor([2, 3]),
    ...     loss_mask_R=torch.tensor([1, 1, 1, 0, 1]),
    ... )
    >>> rollout.row_R.tolist()
    [0, 0, 1, 1, 1]
    >>> rollout.spread(torch.tensor([0.5, -0.5])).tolist()
    [0.5, 0.5, -0.5, -0.5, -0.5]
    >>> rollout.token_rewards_NL(rollout.rewards_N, AdvantageOptions()).tolist()
    [[0.0, 1.0], [0.0, 0.0]]
    >>> rollout.flat(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [1.0, 2.0, 3.0, 0.0, 4.0]
    """

    rewards_N: Tensor
    group_indices_N: Tensor
    counted_N: Tensor
    """The result of `counted_rows`."""
    response_lengths_N: Tensor
    loss_mask_R: Tensor
    kl_R: Tensor | None = None
    """log p_old - log p_ref of each token (k1), not bounded; None unless the reward or the advantage includes it."""
    values_R: Tensor | None = None
    """The critic's value of the state in which each token was sampled; None without a critic."""

    @cached_property
    def row_R(self) -> Tensor:
        """Each token's sample number."""
        return torch.repeat_interleave(torch.arange(len(self.rewards_N)), self.response_lengths_N)

    @cached_property
    def mask_R(self) -> Tensor:
        """bool: tokens that count."""
        return (self.loss_mask_R != 0) & self.counted_N[self.row_R]

    def spread(self, values_N: Tensor) -> Tensor:
        """Return [R]: each sample's number on each of its tokens."""
        return values_N[self.row_R]

    def shaped_rewards_N(self, options: AdvantageOptions) -> Tensor:
        """Return reward - kl_coef x the sum of the response's KL: the reward when a whole response is one action."""
        rewards_N = self.rewards_N.double()
        if self.kl_R is None or not options.kl_coef:
            return rewards_N
        penalties_R = torch.where(self.mask_R, _bounded(self.kl_R, options).double(), 0.0)
        return rewards_N - options.kl_coef * torch.zeros_like(rewards_N).index_add_(0, self.row_R, penalties_R)

    def token_rewards_NL(self, rewards_N: Tensor, options: AdvantageOptions) -> Tensor:
        """Return each counted token's reward: -kl_coef x its KL, plus the entry of `rewards_N` at the last token."""
        if self.kl_R is None or not options.kl_coef:
            rewards_NL = self.padded(torch.zeros(len(self.row_R)))
        else:
            rewards_NL = -options.kl_coef * self.padded(_bounded(self.kl_R, options))
        rows = self._num_tokens_N.nonzero().flatten()
        rewards_NL[rows, self._num_tokens_N[rows] - 1] += rewards_N[rows].double()
        return rewards_NL

    def padded(self, values_R: Tensor) -> Tensor:
        """Return [N, L] float64: the values of counted tokens, in order, padded with 0 at the end."""
        values_NL = torch.zeros(len(self.rewards_N), int(self._num_tokens_N.amax()), dtype=torch.float64)
        values_NL[self.row_R[self.mask_R], self._places] = values_R[self.mask_R].double()
        return values_NL

    def flat(self, values_NL: Tensor) -> Tensor:
        """Undo `padded`: return [R], with 0 on tokens that do not count."""
        values_R = values_NL.new_zeros(len(self.row_R))
        values_R[self.mask_R] = values_NL[self.row_R[self.mask_R], self._places]
        return values_R

    @cached_property
    def _num_tokens_N(self) -> Tensor:
        """The number of counted tokens in each sample."""
        return torch.bincount(self.row_R[self.mask_R], minlength=len(self.rewards_N))

    @cached_property
    def _places(self) -> Tensor:
        """The position of each counted token among the counted tokens of its sample."""
        starts_N = self._num_tokens_N.cumsum(0) - self._num_tokens_N
        rows = self.row_R[self.mask_R]
        return torch.arange(len(rows)) - starts_N[rows]


Estimator = Callable[[RolloutRewards, AdvantageOptions], Tensor]
"""Returns advantages, [R] float64; the values of tokens that the mask leaves out do not matter."""


def _bounded(kl_R: Tensor, options: AdvantageOptions) -> Tensor:
    return kl_R if options.kl_clamp is None else kl_R.clamp(-options.kl_clamp, options.kl_clamp)


def counted_rows(rewards_N: Tensor, group_indices_N: Tensor, *, compares_group: bool = True) -> Tensor:
    """Return [N] bool: the samples that training counts.

    A sample whose reward is nan is not counted. When the estimator compares groups, a group with fewer than two rewards
    is not counted either, because one reward has no baseline.
    """
    if not compares_group:
        return ~rewards_N.isnan()
    counted_N = torch.zeros(len(rewards_N), dtype=torch.bool)
    for rows_G in judged_groups(rewards_N, group_indices_N):
        counted_N[rows_G] = len(rows_G) >= 2
    return counted_N


def judged_groups(rewards_N: Tensor, group_indices_N: Tensor) -> list[Tensor]:
    """Return, for each group that has a reward, the rows that have one."""
    groups: dict[int, list[int]] = {}
    for row in range(len(rewards_N)):
        if not bool(rewards_N[row].isnan()):
            groups.setdefault(int(group_indices_N[row]), []).append(row)
    return [torch.tensor(rows) for rows in groups.values()]


def discounted_returns(rewards_NL: Tensor, gamma: float) -> Tensor:
    """Return [N, L]: the sum over s >= t of gamma^(s - t) x reward s."""
    if gamma == 1.0:
        return rewards_NL.flip(1).cumsum(1).flip(1)
    returns_NL = rewards_NL.clone()
    for place in range(returns_NL.size(1) - 2, -1, -1):
        returns_NL[:, place] += gamma * returns_NL[:, place + 1]
    return returns_NL
