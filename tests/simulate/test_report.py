"""`slime plan --simulate`: its text, its JSON, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slime.cli.plan import main
from slime.cli.train import train
from slime.cli.train_async import train as train_async
from slime.config.problem import UsageError
from slime.core.verbs import Story
from slime.simulate.lengths import LogNormal
from slime.simulate.loop import run_story
from slime.simulate.report import simulate
from slime.simulate.speeds import CPU_SHAPE, Speeds
from slime.simulate.study import counted, gpus_of, splits
from slime.simulate.tables import WIDTH
from tests.simulate.plans_for_tests import plan_args

STORIES: dict[int, Story] = {0: train, 1: train_async}
SPEEDS = Speeds(CPU_SHAPE.scaled(0.01), train_flops=1e9, running_limit=4)
KNOWN: dict[str, Any] = {
    "simulate": True,
    "dry_run": True,
    "simulate_lengths": (20.0, 60.0),
    "simulate_request_speed": 100.0,
    "simulate_engine_speed": 1000.0,
    "simulate_train_tflops": 0.001,
    "rollout_num_gpus": 3,
    "actor_num_gpus_per_node": 5,
    "sglang_server_concurrency": 4,
}


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_tables_fit_and_agree_with_json(ahead: int, tmp_path: Path) -> None:
    path = tmp_path / "simulation.jsonl"
    args = plan_args(**KNOWN, rollouts_ahead=ahead, simulate_json=str(path))
    text = simulate(args, STORIES)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "…" not in text
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    by_table = {name: [row for row in rows if row["table"] == name] for name in ("step", "splits", "effects")}
    divided = [row for row in by_table["splits"] if "shared" not in row["note"]]
    assert {row["train"] + row["generate"] for row in divided} == {8}
    assert sum("best" in row["note"] for row in by_table["splits"]) == 1
    best = min(by_table["splits"], key=lambda row: row["seconds"])
    assert "best" in best["note"]
    assert any("shared" in row["note"] for row in by_table["splits"]) == (not ahead)
    planned = {row["name"]: row["plan"] for row in by_table["effects"]}
    assert planned["one rollout ahead"] == ("on" if ahead else "off")
    phases = sum(row["share"] for row in by_table["step"] if row["seconds"] is not None and row["share"] is not None)
    assert phases == pytest.approx(1.0)
    sources = {row["name"]: row["source"] for row in rows if row["table"] == "assumptions"}
    assert sources["a request"] == "--simulate-request-speed and --simulate-engine-speed"
    assert sources["weight sync"] == "not known, so 0"


def test_only_the_steady_state_counts() -> None:
    args = plan_args(**KNOWN)
    steps = run_story(train, args, SPEEDS, LogNormal(20.0, 60.0, 64, prompt_length=8), num_rollouts=4)
    assert counted(args, steps) == steps
    assert counted(replace(args, rollouts_ahead=1), steps) == steps[1:3]
    assert counted(replace(args, over_sampling_batch_size=6), steps) == steps[1:]


def test_engines_of_several_gpus_stay_whole() -> None:
    args = plan_args(rollout_num_gpus_per_engine=2, tensor_model_parallel_size=2, actor_num_gpus_per_node=4)
    found = splits(replace(args, rollout_num_gpus=4), 8)
    assert [(each.actor_world_size, each.rollout_num_gpus) for each in found] == [(2, 6), (4, 4), (6, 2), (8, 8)]
    assert [each.data_parallel_size for each in found] == [1, 2, 3, 4]
    assert [gpus_of(each) for each in found] == [8] * 4
    assert splits(args, 2)[0].colocate  # too few to divide


def test_missing_speeds_are_one_clear_error() -> None:
    args = plan_args(**KNOWN)
    with pytest.raises(UsageError, match=r"--simulate-request-speed .not given.: nothing is known"):
        simulate(replace(args, simulate_request_speed=None), STORIES)
    with pytest.raises(UsageError, match=r"--simulate-train-tflops .not given.: nothing is known"):
        simulate(replace(args, simulate_train_tflops=None), STORIES)
    with pytest.raises(UsageError, match="--rollout-num-gpus: a simulation needs engines"):
        simulate(replace(args, rollout_num_gpus=0), STORIES)
    with pytest.raises(UsageError, match="--debug-train-only: --simulate knows only"):
        simulate(replace(args, debug_train_only=True), STORIES)
    with pytest.raises(UsageError, match=r"--simulate-drop-rate 0\.99: the simulated run ends"):
        simulate(replace(args, simulate_drop_rate=0.99), STORIES)


def test_a_gpu_plan_is_estimated() -> None:
    given = {name: value for name, value in KNOWN.items() if "speed" not in name and "tflops" not in name}
    text = simulate(plan_args(**given, gpu_memory=80.0, rollout_engine="sglang", bf16=True), STORIES)
    assert "estimate: H100, 60% of bandwidth" in " ".join(text.split())
    assert "estimate: 40% of an H100" in text


def test_a_simulation_needs_a_dry_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from slime.cli.train import main as train_main

    with pytest.raises(SystemExit) as caught:
        train_main(["--simulate", "--log-dir", str(tmp_path)])
    assert "--simulate: simulates the run and starts nothing, but this is no dry run" in str(caught.value)


def test_slime_plan_prints_both(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = [
        *("--num-layers", "4", "--hidden-size", "128", "--ffn-hidden-size", "256", "--num-attention-heads", "4"),
        *("--group-query-attention", "--num-query-groups", "2", "--kv-channels", "32", "--vocab-size", "512"),
        *("--max-position-embeddings", "16384", "--swiglu", "--untie-embeddings-and-output-weights"),
        *("--normalization", "RMSNorm", "--disable-bias-linear", "--qk-layernorm"),
    ]
    run = [
        *("--hf-checkpoint", "model", "--prompt-data", "train.jsonl", "--label-key", "label", "--rm-type", "random"),
        *("--num-rollout", "3", "--rollout-batch-size", "4", "--n-samples-per-prompt", "2", "--rollout-num-gpus", "2"),
        *("--no-bf16", "--simulate", "--simulate-lengths", "20", "60", "--simulate-request-speed", "100"),
        *("--simulate-train-tflops", "0.001", "--save", str(tmp_path / "out")),
    ]
    main([*model, *run])
    text = capsys.readouterr().out
    assert text.index("Devices") < text.index("Assumptions of the simulation") < text.index("Splits of 3 GPUs")
