"""Micro-batches are packed one ahead of the model: in order, and never more than two at a time."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_attention import SHAPE
from worker_pool import WorkerPool

from slime.algo.losses import LossInputs, LossOptions
from slime.config.args import Args
from slime.megatron.microbatch import MicroBatch, pack_rows
from slime.megatron.packs import Packs
from slime.megatron.trainer import Trainer

BATCH = tiny.random_batch(8)
ALIVE: list[int] = []
"""The number of micro-batches that exist while each of them computes its loss."""


def counting(inputs: LossInputs, options: LossOptions) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ALIVE.append(sum(isinstance(thing, MicroBatch) for thing in gc.get_objects()))
    return -inputs.log_probs_R * inputs.advantages_R, {}


def alive_in_steps(
    rank: int, world_size: int, init_method: str, args: Args, keep: bool
) -> tuple[list[int], dict[str, float]]:
    """Return the micro-batches alive in each loss of a rollout; `keep` holds on to all, as a list would."""
    ALIVE.clear()
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        kept: list[Any] = []
        packs = trainer._packs
        if keep:
            trainer._packs = lambda own, steps: _kept(packs(own, steps), kept)
        metrics = trainer.train(0, BATCH)
        return list(ALIVE), metrics
    finally:
        trainer.close()


def _kept(packs: Packs, kept: list[Any]) -> Packs:
    pack = packs._pack

    def keeping(content: Any) -> MicroBatch:
        kept.append(pack(content))
        return kept[-1]

    packs._pack = keeping
    return packs


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_dir(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.mark.dist
def test_at_most_two_micro_batches_exist(workers: WorkerPool, hf: Path) -> None:
    custom = {"loss_type": "custom_loss", "custom_loss_function_path": "test_packs.counting"}
    args = tiny.make_args(hf, max_tokens_per_gpu=40, use_kl_loss=True, kl_loss_coef=0.1, **custom)
    [(alive, metrics)] = workers.run(1, alive_in_steps, args, False)
    assert len(alive) == metrics["train/num_micro_batches"] >= 4
    assert max(alive) == 2, "the one that computes, and the next"
    assert alive[-1] == 1
    [(kept, same)] = workers.run(1, alive_in_steps, args, True)
    assert max(kept) >= len(alive), "control: a list of all would be seen"
    assert same["train/loss"] == metrics["train/loss"]


def test_readers_take_every_pack_in_order() -> None:
    made: list[int] = []

    def pack(row: int) -> MicroBatch:
        made.append(row)
        return pack_rows(BATCH, [row], arch=SHAPE, multiple=1)

    packs = Packs(pack, [3, 1, 4], BATCH.total_lengths_N[[3, 1, 4]].tolist())
    for _ in range(2):  # a second pass packs again
        made.clear()
        [reader] = packs.readers(1)
        assert made == [3]
        assert next(reader).tokens_B.size(1) == BATCH.total_lengths_N[3]
        packs.prepare()
        packs.prepare()
        assert made == [3, 1], "one ahead, not two"
        assert [each.tokens_B.size(1) for each in reader] == BATCH.total_lengths_N[[1, 4]].tolist()
        assert made == [3, 1, 4]


def test_virtual_stages_share_what_is_packed() -> None:
    made: list[int] = []

    def pack(row: int) -> MicroBatch:
        made.append(row)
        return pack_rows(BATCH, [row], arch=SHAPE, multiple=1)

    packs = Packs(pack, [0, 1, 2, 3], BATCH.total_lengths_N[:4].tolist())
    first, second = packs.readers(2)
    ahead = [next(first), next(first)]
    assert [next(second), next(second)] == ahead and not packs._made, "each pack is forgotten with its last reader"
    rest = list(first)
    assert list(second) == rest and made == [0, 1, 2, 3]
