"""Tokens that no policy sampled (a tool's output, loss mask 0): their columns enter neither gradient nor metric."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny
from runs import difference
from worker_pool import WorkerPool

from slime.core.batch import Array, TrainBatch

pytestmark = pytest.mark.dist


def carrying(batch: TrainBatch, where_R: Array, log_prob: float, version: int) -> TrainBatch:
    columns = {
        "rollout_log_probs": np.where(where_R, log_prob, batch.columns["rollout_log_probs"]).astype(np.float32),
        "policy_versions": np.where(where_R, version, batch.columns["policy_versions"]).astype(np.int32),
    }
    return replace(batch, columns={**batch.columns, **columns})


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "time/" not in name and "per_second" not in name}


def test_unsampled_tokens_change_no_gradient_or_metric(workers: WorkerPool, tmp_path: Path) -> None:
    hf = tiny.hf_dir(tmp_path / "hf", "qwen3")
    args = tiny.make_args(hf, use_tis=True, clip_grad=0.0, num_steps_per_rollout=2)
    batch = tiny.random_batch()
    versions_R = np.arange(len(batch.columns["loss_mask"])) % 2  # every other token is off-policy
    batch = replace(batch, columns={**batch.columns, "policy_versions": versions_R.astype(np.int32)})
    unsampled_R = batch.columns["loss_mask"] == 0
    assert unsampled_R.sum() > 5
    one_counted_R = np.zeros_like(unsampled_R)
    one_counted_R[np.flatnonzero(~unsampled_R)[0]] = True

    variants = [
        carrying(batch, unsampled_R, 0.0, 1),
        carrying(batch, unsampled_R, -50.0, 0),
        carrying(batch, one_counted_R, -50.0, 1),
    ]
    usual, other, control = [workers.run(1, runs.train, args, [variant])[0] for variant in variants]
    assert without_times(other.metrics[0]) == without_times(usual.metrics[0])
    assert difference(other.gradients, usual.gradients) == 0
    assert {"train/logprob_gap_max", "train/offpolicy_tokens", "train/tis_weight"} <= usual.metrics[0].keys()
    assert control.metrics[0]["train/logprob_gap_max"] > usual.metrics[0]["train/logprob_gap_max"] + 10
    assert control.metrics[0]["train/tis_weight"] != usual.metrics[0]["train/tis_weight"]
