"""Bugs that the layout property has to notice, put into a run by name.

Each of them has been made in frameworks like this one, and leaves the loss plausible: the weights have the right sum,
every token is there once, and a run still learns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from slime.core.batch import Array, TrainBatch
from slime.core.rank_batch import RankStep
from slime.megatron import critic, trainer
from slime.megatron.microbatch import Cut, MicroBatch
from slime.megatron.packs import Packs
from slime.megatron.step import WeightedLoss
from tests.layouts.draws import Draw

Patch = AbstractContextManager[Any]


def own_denominator() -> Patch:
    """Let every rank divide by its own denominator, and average the ranks' means."""
    packs = trainer.Trainer._packs

    def wrong(self: trainer.Trainer, own: TrainBatch, steps: Sequence[RankStep]) -> Packs:
        if own.has("loss_weights"):
            rows = [row for step in steps for micro_batch in step.micro_batches for row in micro_batch]
            part = sum(float(own.rows("loss_weights")[row].sum()) for row in rows)
            having = torch.tensor(float(part > 0))
            dist.all_reduce(having, group=self.topology.dp_cp_group)
            if part:
                own = own.with_column("loss_weights", own.columns["loss_weights"] / (part * float(having)))
        return packs(self, own, steps)

    return patch.object(trainer.Trainer, "_packs", wrong)


def shifted_mask() -> Patch:
    """Give every token the weight of the token before it."""
    packs = trainer.Trainer._packs

    def wrong(self: trainer.Trainer, own: TrainBatch, steps: Sequence[RankStep]) -> Packs:
        if own.has("loss_weights"):
            own = own.with_column("loss_weights", np.roll(own.columns["loss_weights"], 1))
        return packs(self, own, steps)

    return patch.object(trainer.Trainer, "_packs", wrong)


def contiguous_slice() -> Patch:
    """Give a rank two neighbouring chunks, while attention still assumes the zigzag pair of a first and a last one."""
    of = Cut.of

    def wrong(lengths_S: Array, num_ranks: int) -> Cut:
        cut = of(lengths_S, num_ranks)
        return cut if num_ranks == 1 else replace(cut, tokens_CB=_neighbouring(lengths_S, num_ranks))

    return patch.object(Cut, "of", wrong)


def _neighbouring(lengths_S: Array, num_ranks: int) -> Array:
    """Return [C, B] indices into the pack: one contiguous piece of every sequence for each rank."""
    ends_S = np.cumsum(lengths_S)
    pieces = [np.split(np.arange(end - size, end), num_ranks) for end, size in zip(ends_S, lengths_S, strict=True)]
    return np.stack([np.concatenate([piece[rank] for piece in pieces]) for rank in range(num_ranks)])


def unweighted_critic() -> Patch:
    """Count every rank's share of the value loss as if the rank had all samples."""
    weighted_loss = critic.Critic._weighted_loss

    def wrong(self: critic.Critic, micro_batch: MicroBatch, hidden: Tensor) -> WeightedLoss:
        total, data = weighted_loss(self, micro_batch, hidden)
        return total * self._steps.topology.dp_size, data

    return patch.object(critic.Critic, "_weighted_loss", wrong)


BUGS: dict[str, Callable[[], Patch]] = {
    "own denominator": own_denominator,
    "shifted mask": shifted_mask,
    "contiguous slice": contiguous_slice,
    "unweighted critic": unweighted_critic,
}


def exercises(bug: str, draw: Draw) -> bool:
    """Return whether a draw runs the code that has the bug."""
    dimensions = draw.dimensions()
    return {
        # ranks with equally many samples, or halves of one, have the same denominator; of masked tokens they have not
        "own denominator": dimensions["DP"] != "1"
        and dimensions["CP"] == "1"
        and dimensions["loss"] == "of tokens"
        and dimensions["masked"] == "some",
        "shifted mask": dimensions["masked"] != "none",
        "contiguous slice": dimensions["CP"] != "1",
        "unweighted critic": dimensions["DP"] != "1" and dimensions["algorithm"] == "ppo",
    }[bug]
