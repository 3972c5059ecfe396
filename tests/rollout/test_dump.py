"""Rollout dumps give back every number bit for bit."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest

from slime.config.sampling_record import SamplingRecord, read_record
from slime.core.sample import Sample, Status
from slime.rollout.dump import read_dump, write_dump


def test_round_trip_is_exact(tmp_path: Path) -> None:
    sample = Sample(
        group_index=3,
        index=24,
        prompt=[{"role": "user", "content": "1+1=?"}],
        label="2",
        tokens=[1, 2, 3, 4],
        prompt_length=2,
        response="x\u2028y",
        response_length=2,
        rollout_log_probs=[-0.1 - 2**-40, -math.pi],
        policy_versions=[4, 5],
        reward=1 / 3,
        status=Status.TRUNCATED,
        metadata={"start_rollout_id": 2},
    )
    sample.routed_experts = np.array([[[3, 1]], [[0, 127]], [[-1, 5]]], dtype=np.int32)
    failed = Sample(index=25, reward=None, reward_failure="timeout", status=Status.FAILED)
    path = tmp_path / "nested" / "0.jsonl"
    write_dump(path, [[sample, failed], [sample]])
    read = read_dump(path)
    assert read == [[sample, failed], [sample]]
    routes = read[0][0].routed_experts
    assert routes is not None and routes.dtype == np.int32
    np.testing.assert_array_equal(routes, sample.routed_experts)
    assert read[0][1].routed_experts is None
    assert read_record(path) is None, "as in dumps of older versions"
    record = SamplingRecord(sampling={"temperature": 0.7}, tokenizer="digest", vocab_size=30)
    write_dump(path, [[sample], [failed]], record)
    assert (read_dump(path), read_record(path)) == ([[sample], [failed]], record)


def test_a_foreign_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "dump.jsonl"
    path.write_text('[]\n[{"surprise": 1}]\n')
    with pytest.raises(ValueError, match=r"dump\.jsonl:2: not a dumped group"):
        read_dump(path)
    with pytest.raises(ValueError, match="no such file"):
        read_dump(tmp_path / "missing.jsonl")


class Touches:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self._path), "w")


def test_a_pickle_as_dump_is_not_run(tmp_path: Path) -> None:
    path, marker = tmp_path / "dump.jsonl", tmp_path / "marker"
    for content in (pickle.dumps(Touches(marker)), b"\xff\n", b"[" * 100_000, b"[[1]]", b"1"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"dump\.jsonl:1: not a dumped group"):
            read_dump(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Touches(marker)))
    assert marker.exists(), "control: whoever unpickles it shows"
