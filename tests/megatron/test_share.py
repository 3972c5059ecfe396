"""Data-parallel ranks exchange numbers: all get the same bits, whoever has which rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from worker_pool import WorkerPool

from slime.config.args import Args
from slime.config.rollout_plan import data_parallel_rank, parts_of_rollout
from slime.core.batch import TrainBatch
from slime.core.packing import plan_steps
from slime.core.rank_batch import rank_batches
from slime.megatron.advantages import advantage_columns, counted_rows_of, loss_weight_columns
from slime.megatron.offpolicy import offpolicy_columns, version_of_weights
from slime.megatron.share import Share
from slime.megatron.trainer import Trainer


def batch_of() -> TrainBatch:
    """Make a rollout whose last rows alone have older tokens, with log-probs of a trainer and of a reference."""
    batch = tiny.random_batch(9, group=3, seed=3)
    chance = np.random.default_rng(0)
    num_responses = int(batch.response_lengths_N.sum())
    versions = np.full(num_responses, 5)
    versions[-3:] = 4
    for name in ("old_log_probs", "ref_log_probs", "values"):
        batch = batch.with_column(name, chance.standard_normal(num_responses))
    batch.columns["rewards"][1] = np.nan  # a sample that does not count
    return batch.with_column("policy_versions", versions)


def shares_of(batch: TrainBatch, num_ranks: int, *, balance: bool) -> list[Share]:
    plans = plan_steps(
        batch.total_lengths_N.tolist(),
        num_steps=1,
        dp_size=num_ranks,
        max_tokens=None,
        micro_batch_size=1,
        balance=balance,
    )
    return [Share(part, None) for part in rank_batches(batch, plans)]


def exchanged(rank: int, world_size: int, init_method: str, args: Args, balance: bool) -> dict[str, Any]:
    """Return what one rank learns about the rollout."""
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        batch = batch_of()
        share = shares_of(batch, world_size, balance=balance)[rank]
        share = replace(share, group=trainer.topology.dp_host_group)
        counted_N = counted_rows_of(args, share.rows)
        found: dict[str, Any] = {}
        for name in ("reinforce_plus_plus", "ppo", "grpo"):
            algorithm = replace(args, advantage_estimator=name, normalize_advantages=name == "ppo", kl_coef=0.3)
            made, _ = advantage_columns(algorithm, share, share.own.columns, counted_N)
            found[name] = share.whole({**share.own.columns, "advantages": made["advantages"]}).columns["advantages"]
        found["version"] = version_of_weights(replace(args, partial_rollout=True), 4, share, 5)
        older, found["metrics"] = offpolicy_columns(args, share, counted_N, found["version"])
        assert older.keys() == {"offpolicy", "weighted"}, "on the ranks without older tokens, too"
        for name, values in older.items():
            found[name] = share.whole({**share.own.columns, name: values}).columns[name]
        for per_token in (False, True):
            weighting = replace(args, calculate_per_token_loss=per_token)
            made, _ = loss_weight_columns(weighting, share, share.own.columns, counted_N)
            whole = share.whole({**share.own.columns, **made})
            found["tokens" if per_token else "samples"] = whole.columns["loss_weights"]
        found["rows"] = share.all_rows(torch.from_numpy(share.rows_M + 0.5)).tolist()
        found["totals"] = share.totals(len(share.own), 1) + share.largest(rank, -rank)
        found["places"] = np.concatenate(share.gathered(share.places(np.arange(len(share.own.columns["loss_mask"])))))
        whole = share.whole(share.own.columns)
        found["whole"] = all(whole.columns[n].tobytes() == c.tobytes() for n, c in batch.columns.items())
        mine = share.own_part(batch.columns["rollout_log_probs"])
        found["part"] = np.array_equal(mine, share.own.columns["rollout_log_probs"])
        return found
    finally:
        trainer.close()


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_dir(tmp_path_factory.mktemp("model"), "qwen2")


@pytest.mark.dist
def test_every_deal_gives_the_same_bits(workers: WorkerPool, hf: Path) -> None:
    args = tiny.make_args(hf)
    [alone] = workers.run(1, exchanged, args, False)
    for balance in (False, True):
        for found in workers.run(2, exchanged, args, balance):
            for name in ("reinforce_plus_plus", "ppo", "grpo", "offpolicy", "weighted", "samples", "tokens"):
                assert found[name].tobytes() == alone[name].tobytes(), (name, balance)
            assert (found["metrics"], found["version"]) == (alone["metrics"], 5)
            assert found["rows"] == [row + 0.5 for row in range(9)]
            assert found["totals"] == [9.0, 2.0, 1.0, 0.0]
            assert sorted(found["places"]) == list(range(len(alone["places"]))) and found["whole"] and found["part"]
            assert list(found["places"]) != sorted(found["places"]) or not balance, "control: the rows are not in order"
    assert not np.array_equal(alone["ppo"], alone["reinforce_plus_plus"])  # control
    assert not np.array_equal(alone["samples"], alone["tokens"]) and alone["offpolicy"].sum() > 0  # control


def wrong_part(rank: int, world_size: int, init_method: str, args: Args) -> str:
    """Return the error of a trainer that gets the part of another data-parallel rank."""
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        parts = parts_of_rollout(args, batch_of(), num_ranks=world_size, num_steps=1)
        assert trainer.share(parts[data_parallel_rank(args, rank)], 1).batch.rank == rank  # control
        with pytest.raises(RuntimeError) as raised:
            trainer.share(parts[1 - rank], 1)
        return str(raised.value)
    finally:
        trainer.close()


@pytest.mark.dist
def test_the_part_of_another_rank_is_refused(workers: WorkerPool, hf: Path) -> None:
    errors = workers.run(2, wrong_part, tiny.make_args(hf, actor_num_gpus_per_node=2))
    assert "data-parallel rank 1 of 2, and got the rows of rank 0 of 2" in errors[1]


def ranks(rank: int, world_size: int, init_method: str, args: Args) -> tuple[int, int]:
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        return trainer.topology.dp_rank, data_parallel_rank(args, rank)
    finally:
        trainer.close()


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["tensor_model", "context", "pipeline_model"])
def test_megatron_numbers_data_parallel_ranks_so(kind: str, workers: WorkerPool, hf: Path) -> None:
    args = tiny.make_args(hf, actor_num_gpus_per_node=4, **{f"{kind}_parallel_size": 2})
    found = workers.run(4, ranks, args)
    assert all(ours == megatrons for megatrons, ours in found)
    assert [ours for _, ours in found] == ([0, 1, 0, 1] if kind == "pipeline_model" else [0, 0, 1, 1])
