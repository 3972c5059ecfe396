"""The benchmarks at tiny sizes: both sides do the same work in turns, and tables reach their page."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker_pool import WorkerPool

from bench import arrival, host, memory, packing, report, state, trainer
from bench.common import ROOT, Spread, Table, in_turns, ratios
from slime.core.batch import from_samples
from slime.core.packing import StepPlan
from slime.core.sample import Sample
from slime.engine.generate_answer import read_answer

PAGE = ROOT / "docs" / "PERFORMANCE.md"


def test_sides_take_turns_without_warmups() -> None:
    calls: list[str] = []

    def side(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    found = in_turns({"a": lambda: side("a"), "b": lambda: side("b")}, rounds=2, warmup=1)
    assert "".join(calls) == "ababab"
    assert found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_ratios_compare_the_same_turn() -> None:
    """Both sides became ten times slower in the middle: the ratio did not change, that of the medians would."""
    spread = ratios([20.0, 2.0, 22.0], [10.0, 1.0, 11.0])
    assert (spread.median, spread.low, spread.high, spread.count) == (2.0, 2.0, 2.0, 3)


def a_result(**changes: Any) -> dict[str, Any]:
    table = Table("Speed", ["batch", "ratio"], [["32", Spread.of([1.0, 2.0, 4.0]).show(1)]])
    return {
        "command": "make bench-engine",
        "facts": {"machine": "2 CPU cores", "torch": "2.13.0"},
        "tables": [vars(table)],
        "goals": [{"what": "engine", "ratio": 1.4, "goal": 1.5}],
        **changes,
    }


def test_tables_reach_only_their_block() -> None:
    page = PAGE.read_text(encoding="utf-8")
    once = report.filled(page, {"engine": a_result(), "unknown": a_result()})
    assert "| 32 | 2.0 (1.0–4.0) |" in once and "| engine | 1.40 | 1.5 | missed |" in once
    assert "`make bench-engine`: machine 2 CPU cores, torch 2.13.0." in once
    twice = report.filled(once, {"engine": a_result()})
    assert twice == once
    outside = report.BLOCK.sub("", page)
    assert report.BLOCK.sub("", once) == outside
    assert {match[2] for match in report.BLOCK.finditer(page)} == {
        "engine",
        "trainer",
        "packing",
        "host",
        "loop",
        "rollout",
        "evaluation",
        "state",
        "checkpoint",
        "sync",
        "memory",
        "arrival",
    }


def test_the_state_benchmark_restores_what_it_saves(tmp_path: Path) -> None:
    groups, times = state.partial_samples(20, 30), state.Times()
    num_bytes, manifest_bytes = state.measure(groups, times, under=tmp_path, rounds=2, in_json=groups[:1])
    assert num_bytes > 20 * 30 * 8 and manifest_bytes < 1000 and list(tmp_path.iterdir()) == []
    parts = (*state.SAVE, *state.RESTORE, *state.PLAIN, *state.JSON)
    assert {part: len(times.cpu[part]) for part in parts} == dict.fromkeys(parts, 2)
    table = state.table_of(times, dict.fromkeys(parts, 600), "")
    assert [row[0] for row in table.rows] == [*state.SAVE, "plain write", *state.RESTORE, "plain read", *state.JSON]


def test_the_host_benchmark_cuts_a_rollout() -> None:
    args = host.Args(architecture=packing.QWEN3_4B, num_steps_per_rollout=1, partial_rollout=True)
    table, [size, _], _ = host.measure(args, host.rollout(128, 16), 1)
    assert [row[0] for row in table.rows] == [str(ranks) for ranks in host.RANKS]
    assert size.ratio > 4, "a part of 64 is smaller than the batch, although it knows of all rows"


def test_growth_is_seen_under_noise() -> None:
    """One role leaks 100 KiB a rollout; the others are flat, but for checkpoints of 50 MiB."""
    draw = np.random.default_rng(0)

    def bytes_after(rollout: int, leak: int) -> dict[str, int]:
        noise = int(draw.integers(2**20)) + 50 * 2**20 * (rollout % 25 == 0)
        return {role: 2**28 + noise + leak * rollout * (role == "trainer") for role in memory.MEASURED}

    table, largest = memory.growth_table([bytes_after(rollout, 100 * 1024) for rollout in range(200)], 60)
    assert largest == pytest.approx(100, abs=5) and table.rows[memory.MEASURED.index("trainer")][3] == f"{largest:.1f}"
    assert memory.growth_table([bytes_after(rollout, 0) for rollout in range(200)], 60)[1] < 5
    assert doctest.testmod(memory).failed == 0


def test_the_packing_benchmark_checks_its_plans() -> None:
    table, goals, raw = packing.packing_table(5)
    assert [goal.met for goal in goals] == [True] * 3 and {len(ratios) for ratios in raw.values()} == {5}
    assert [len(row) for row in table.rows] == [len(table.columns)] * 3
    table, [seconds], _ = packing.planning_table(2_000, 16, 1)
    assert seconds.ratio > 0 and [len(row) for row in table.rows] == [len(table.columns)] * 6
    lengths = np.array([6, 6, 3])
    packing.check(StepPlan([[[0], [1, 2]]]), lengths, 9)
    for wrong, message in (([[0], [1]], "every row"), ([[0], [1, 2], [2]], "every row"), ([[0, 1], [2]], "over its")):
        with pytest.raises(RuntimeError, match=message):
            packing.check(StepPlan([wrong]), lengths, 9)
    packing.check(StepPlan([[[0], [1, 2]]]), np.array([60, 6, 3]), 9)  # alone


def both_sides(
    rank: int, world_size: int, init_method: str, model_dir: str, lengths: list[int]
) -> dict[str, dict[str, float]]:
    """Return first loss and gradient norm of each side, and the parts of slime's second step."""
    slime = trainer.SlimeSide(model_dir, lengths, 1)
    try:
        steps = {"slime": slime.step()}
        for layout in ("rows", "packed"):
            steps[layout] = trainer.PlainSide(model_dir, lengths, layout, 1).step()
        with trainer.Markers(slime.model) as markers:
            return {**steps, "parts": markers.step(slime)}
    finally:
        slime.trainer.close()


@pytest.mark.dist
def test_the_trainers_sides_do_the_same_work(workers: WorkerPool, tmp_path: Path) -> None:
    trainer.make_model_dir(tmp_path, num_hidden_layers=2)
    [found] = workers.run(1, both_sides, str(tmp_path), [16, 9, 12])
    parts = found.pop("parts")
    trainer.check_same_work(found)
    assert parts.keys() == set(trainer.PARTS) and min(parts.values()) >= 0
    other = {**found["rows"], "loss": found["rows"]["loss"] * 1.001}
    with pytest.raises(RuntimeError, match="loss of the first step"):
        trainer.check_same_work({**found, "rows": other})


def test_the_engines_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "engine.json"
    command = [sys.executable, "-m", "bench.engine", "--concurrent", "3", "--equal", "4", "--low", "2", "--high", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--rounds", "1", "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert len(result["goals"]) == 2
    for table in result["tables"]:
        assert [len(row) for row in table["rows"]] == [len(table["columns"])] * 2
        assert table["title"] in done.stdout
    for case in result["raw"].values():
        assert all(rate > 0 for rates in case["tokens_per_second"].values() for rate in rates)
        assert all(seconds >= 0 for seconds in case["usage"].values())


def test_the_arrival_benchmark_walks_the_way() -> None:
    table = arrival.measure_steps(400, 32, 1, arrival.make_tokenizer(1000))
    names = [row[0] for row in table.rows]
    assert names[0] == "answer to arrays" and names[-2:] == ["all of them", "`orjson.loads` alone"]
    answers = [arrival.make_answer(4, seed, 1000) for seed in range(2)]
    samples = [
        Sample(group_index=0, index=n, tokens=[5] * arrival.PROMPT, prompt_length=arrival.PROMPT) for n in range(2)
    ]
    for sample, raw in zip(samples, answers, strict=True):
        response = read_answer(raw)
        sample.set_arrays(tokens=np.append(sample.tokens_T, response.tokens_R), rollout_log_probs=response.log_probs_R)
        sample.response_length = 4
    arrival.check_batch(from_samples(samples), answers)
    samples[1].rollout_log_probs = [-0.5] * 4
    with pytest.raises(AssertionError):
        arrival.check_batch(from_samples(samples), answers)
