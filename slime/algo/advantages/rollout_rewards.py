"""The input of every estimator: rewards, groups and masks of a rollout, and how rewards are assigned to tokens.

- Used by: `megatron.advantages` makes one from the batch's columns; the estimators in this folder read it.
- Invariant: a sample whose reward failed (nan) and a token that the mask leaves out have no influence on anything. An
  advantage does not depend on which rank has which samples.

Each data-parallel rank knows the rewards and groups of all samples, and the tokens of its own samples. What needs the
tokens of all, such as a mean over the rollout, is added up sample by sample (`total`): first the tokens of each sample,
in order, then the samples, in order. So every rank gets the same bits, however the samples are dealt.

Everything is computed in float64.

_N: all samples. _M: the rank's own samples. _R: their response tokens. _G: the samples of one group; groups may differ
in size. _L: a sample's counted tokens, in order and without gaps for the tokens that the mask leaves out, padded with 0
at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from slime.algo.reducers import sums_of_rows, whiten


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


def _unchanged(values_M: Tensor) -> Tensor:
    return values_M


@dataclass(frozen=True, kw_only=True)
class RolloutRewards:
    """The rewards of all samples of a rollout, the tokens of a rank's own, and operations between the axes.

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
    >>> rollout.token_rewards_ML(rollout.rewards_N, AdvantageOptions()).tolist()
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
    rows_M: Tensor | None = None
    """int64, ascending: the samples whose tokens are here; None: all."""
    all_rows: Callable[[Tensor], Tensor] = _unchanged
    """[M] float64 -> [N]: the numbers of all samples from those of every rank's own samples. Collective."""

    @cached_property
    def own_rows_M(self) -> Tensor:
        """The samples whose tokens are here."""
        return torch.arange(len(self.rewards_N)) if self.rows_M is None else self.rows_M

    @cached_property
    def own_R(self) -> Tensor:
        """Each token's sample, as an index into the own samples."""
        rows_M = self.own_rows_M
        return torch.repeat_interleave(torch.arange(len(rows_M)), self.response_lengths_N[rows_M])

    @cached_property
    def row_R(self) -> Tensor:
        """Each token's sample number."""
        return self.own_rows_M[self.own_R]

    @cached_property
    def mask_R(self) -> Tensor:
        """bool: tokens that count."""
        return (self.loss_mask_R != 0) & self.counted_N[self.row_R]

    def spread(self, values_N: Tensor) -> Tensor:
        """Return [R]: each sample's number on each of its tokens."""
        return values_N[self.row_R]

    def total(self, values_R: Tensor) -> float:
        """Return the sum over the tokens of all samples, in float64 and with the same bits on every rank. Collective.

        Example: the ranks have the samples 0 and 2, and 1. Each adds up the tokens of its samples, all get the three
        sums, and add these up in the order of the samples.
        """
        sums_M = sums_of_rows(values_R.double(), self.own_R, len(self.own_rows_M))
        return float(self.all_rows(sums_M).numpy().sum())

    def whitened(self, values_R: Tensor) -> Tensor:
        """Return [R]: the values, shifted and scaled to mean 0 and deviation 1 over the rollout's counted tokens."""
        return whiten(values_R, self.mask_R, self.total)

    def shaped_rewards_N(self, options: AdvantageOptions) -> Tensor:
        """Return reward - kl_coef x the sum of the response's KL: the reward when a whole response is one action."""
        rewards_N = self.rewards_N.double()
        if self.kl_R is None or not options.kl_coef:
            return rewards_N
        penalties_R = torch.where(self.mask_R, _bounded(self.kl_R, options).double(), 0.0)
        return rewards_N - options.kl_coef * self.all_rows(sums_of_rows(penalties_R, self.own_R, len(self.own_rows_M)))

    def token_rewards_ML(self, rewards_N: Tensor, options: AdvantageOptions) -> Tensor:
        """Return each counted token's reward: -kl_coef x its KL, plus the entry of `rewards_N` at the last token."""
        if self.kl_R is None or not options.kl_coef:
            rewards_ML = self.padded(torch.zeros(len(self.own_R)))
        else:
            rewards_ML = -options.kl_coef * self.padded(_bounded(self.kl_R, options))
        rows = self._num_tokens_M.nonzero().flatten()
        rewards_ML[rows, self._num_tokens_M[rows] - 1] += rewards_N[self.own_rows_M[rows]].double()
        return rewards_ML

    def padded(self, values_R: Tensor) -> Tensor:
        """Return [M, L] float64: the values of counted tokens, in order, padded with 0 at the end."""
        longest = int(self._num_tokens_M.amax()) if len(self.own_rows_M) else 0
        values_ML = torch.zeros(len(self.own_rows_M), longest, dtype=torch.float64)
        values_ML[self.own_R[self.mask_R], self._places] = values_R[self.mask_R].double()
        return values_ML

    def flat(self, values_ML: Tensor) -> Tensor:
        """Undo `padded`: return [R], with 0 on tokens that do not count."""
        values_R = values_ML.new_zeros(len(self.own_R))
        values_R[self.mask_R] = values_ML[self.own_R[self.mask_R], self._places]
        return values_R

    @cached_property
    def _num_tokens_M(self) -> Tensor:
        """The number of counted tokens in each own sample."""
        return torch.bincount(self.own_R[self.mask_R], minlength=len(self.own_rows_M))

    @cached_property
    def _places(self) -> Tensor:
        """The position of each counted token among the counted tokens of its sample."""
        starts_M = self._num_tokens_M.cumsum(0) - self._num_tokens_M
        rows = self.own_R[self.mask_R]
        return torch.arange(len(rows)) - starts_M[rows]


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
    rows = (~rewards_N.isnan()).nonzero().flatten()
    groups, order = group_indices_N[rows].sort(stable=True)  # the rows of a group stay in ascending order
    cuts = (groups.diff() != 0).nonzero().flatten() + 1
    return list(rows[order].tensor_split(cuts)) if len(rows) else []


def discounted_returns(rewards_ML: Tensor, gamma: float) -> Tensor:
    """Return [M, L]: the sum over s >= t of gamma^(s - t) x reward s."""
    if gamma == 1.0:
        return rewards_ML.flip(1).cumsum(1).flip(1)
    returns_ML = rewards_ML.clone()
    for place in range(returns_ML.size(1) - 2, -1, -1):
        returns_ML[:, place] += gamma * returns_ML[:, place + 1]
    return returns_ML
