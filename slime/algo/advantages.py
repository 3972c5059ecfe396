"""Advantages: rewards of a rollout -> one advantage a sample.

Path: the trainer calls the estimator on the rewards of the whole rollout, spreads the result over each sample's
response tokens, and the loss reads it. Invariant: a sample whose reward failed (nan) influences nothing.

Shapes: _N samples of the rollout, _G samples of one group (one prompt; groups may differ in size).
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
    counted_N = torch.zeros(len(rewards_N), dtype=torch.bool)
    for rows_G in _judged_groups(rewards_N, group_indices_N):
        counted_N[rows_G] = len(rows_G) >= 2
    return counted_N


def grpo_advantages(rewards_N: Tensor, group_indices_N: Tensor, *, normalize_std: bool = True) -> Tensor:
    """(r - mean) / (std + 1e-6) within each group, std unbiased (DeepSeekMath, arXiv:2402.03300, section 4.1.2).

    Computed in float64, returned in the rewards' dtype. Exactly 0 where all rewards of the group are equal, and
    for rows that `counted_rows` leaves out. `normalize_std=False`: r - mean (Dr. GRPO, arXiv:2503.20783).
    """
    advantages_N = torch.zeros(len(rewards_N), dtype=torch.float64)
    for rows_G in _judged_groups(rewards_N, group_indices_N):
        rewards_G = rewards_N[rows_G].double()
        # Equal rewards by comparison: their mean may miss them by a rounding, which a tiny std would blow up.
        if len(rows_G) < 2 or bool((rewards_G == rewards_G[0]).all()):
            continue
        advantages_G = rewards_G - rewards_G.mean()
        if normalize_std:
            advantages_G = advantages_G / (rewards_G.std() + 1e-6)
        advantages_N[rows_G] = advantages_G
    return advantages_N.to(rewards_N.dtype)


def _judged_groups(rewards_N: Tensor, group_indices_N: Tensor) -> list[Tensor]:
    """For each group that has a reward, the rows that have one."""
    groups: dict[int, list[int]] = {}
    for row in range(len(rewards_N)):
        if not bool(rewards_N[row].isnan()):
            groups.setdefault(int(group_indices_N[row]), []).append(row)
    return [torch.tensor(rows) for rows in groups.values()]


ESTIMATORS: Mapping[str, Estimator] = {"grpo": grpo_advantages}
