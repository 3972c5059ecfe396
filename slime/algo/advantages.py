"""Advantages: rewards of a rollout -> one advantage a sample.

Path: the trainer calls the estimator on the rewards of the whole rollout, spreads the result over each sample's
response tokens, and the loss reads it. Invariant: a sample whose reward failed (nan) influences nothing.

Shapes: _N samples, _G groups (samples of one prompt; of any size).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Estimator(Protocol):
    """rewards [N], group_indices [N] -> advantages [N]."""

    def __call__(self, rewards_N: Tensor, group_indices_N: Tensor, *, normalize_std: bool) -> Tensor: ...


def counted_rows(rewards_N: Tensor, group_indices_N: Tensor) -> Tensor:
    """[N] bool: the rows that training counts.

    A row whose reward is nan is not counted, nor is any row of a group that has fewer than two rewards left
    (one reward has no baseline).
    """
    _, group_N, valid_N = _groups(rewards_N, group_indices_N)
    size_G = _sum_by_group(valid_N.double(), group_N)
    return valid_N & (size_G[group_N] >= 2)


def grpo_advantages(rewards_N: Tensor, group_indices_N: Tensor, *, normalize_std: bool = True) -> Tensor:
    """(r - mean) / (std + 1e-6) within each group, std unbiased (DeepSeekMath, arXiv:2402.03300, section 4.1.2).

    Computed in float64, returned in the rewards' dtype. Exactly 0 where all rewards of the group are equal, and
    for rows that `counted_rows` leaves out. `normalize_std=False`: r - mean (Dr. GRPO, arXiv:2503.20783).
    """
    num_groups, group_N, valid_N = _groups(rewards_N, group_indices_N)
    counted_N = counted_rows(rewards_N, group_indices_N)
    values_N = torch.where(valid_N, rewards_N.double(), 0.0)
    size_G = _sum_by_group(valid_N.double(), group_N).clamp(min=1)
    mean_G = _sum_by_group(values_N, group_N) / size_G
    centred_N = torch.where(counted_N, values_N - mean_G[group_N], 0.0)
    advantages_N = centred_N
    if normalize_std:
        variance_G = _sum_by_group(centred_N.square(), group_N) / (size_G - 1).clamp(min=1)
        advantages_N = centred_N / (variance_G.sqrt()[group_N] + 1e-6)
    # The mean of equal numbers may miss them by a rounding, which a small std would blow up.
    low_G = torch.full((num_groups,), torch.inf, dtype=torch.float64)
    low_G = low_G.scatter_reduce(0, group_N[valid_N], values_N[valid_N], "amin")
    high_G = torch.full((num_groups,), -torch.inf, dtype=torch.float64)
    high_G = high_G.scatter_reduce(0, group_N[valid_N], values_N[valid_N], "amax")
    return torch.where((low_G == high_G)[group_N], 0.0, advantages_N).to(rewards_N.dtype)


def _groups(rewards_N: Tensor, group_indices_N: Tensor) -> tuple[int, Tensor, Tensor]:
    """Number of groups, each row's group numbered from 0, and which rows have a reward."""
    unique_G, group_N = torch.unique(group_indices_N, return_inverse=True)
    return len(unique_G), group_N, ~torch.isnan(rewards_N)


def _sum_by_group(values_N: Tensor, group_N: Tensor) -> Tensor:
    num_groups = int(group_N.max()) + 1 if len(group_N) else 0
    return values_N.new_zeros(num_groups).index_add_(0, group_N, values_N)


ESTIMATORS: Mapping[str, Estimator] = {"grpo": grpo_advantages}
