"""The scheduling benchmark: its engine produces the requested lengths, and its accounts add up."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.common import ROOT
from bench.rollout_schedule import PARTIAL, Shape
from bench.schedule_loops import Run, hidden_share, loop_flags
from bench.timed_engine import CountingModel, Timing, make_model, make_prompts
from slime.config.parse import load_args
from slime.core.architecture import Architecture
from slime.core.plugins import load_hook
from slime.engine.embedded.cache import KVCache
from slime.engine.embedded.scheduler import Request, Scheduler
from slime.engine.protocol import SamplingParams

TIMING = Timing(median=8, sigma=0.8, cap=24, step=0.0)
PROMPT = [TIMING.cap + 1, TIMING.cap + 2]
END = 0


@pytest.fixture
def scheduler() -> Scheduler:
    architecture = Architecture(
        family="glm4",
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=2,
        num_query_groups=2,
        kv_channels=4,
        vocab_size=TIMING.vocabulary,
        max_position_embeddings=64,
        norm_epsilon=1e-5,
        rotary_base=1e4,
    )
    model = CountingModel(architecture, dtype=torch.float32, timing=TIMING)
    cache = KVCache(architecture, dtype=torch.float32, rows=256, tokens=256 * 64)
    return Scheduler(model, cache, on_finished=lambda _: None, on_failure=lambda _: None)


def responses(scheduler: Scheduler, prompts: list[list[int]], *, first_seed: int, steps: int = 10**6) -> list[Request]:
    """Return the responses after this number of steps."""
    params = SamplingParams(max_new_tokens=TIMING.cap)
    requests = [
        Request(rid=str(i), input_ids=ids, params=params, seed=first_seed + i, stop_token_ids=frozenset([END]))
        for i, ids in enumerate(prompts)
    ]
    with torch.inference_mode():
        for request in requests:
            scheduler.submit(request)
        scheduler._take_commands()
        while (scheduler.num_running or scheduler.num_waiting) and steps:
            scheduler.step()
            steps -= 1
        if scheduler.abort(lambda _: True):
            scheduler.step()  # an aborted request ends with the next token
    return requests


def test_lengths_follow_the_requested_distribution(scheduler: Scheduler) -> None:
    """The seed alone decides a length; over many seeds, the mean and the share of cut ones are the distribution's."""
    assert sum(TIMING.length_probabilities()) == pytest.approx(1)
    done = responses(scheduler, [PROMPT] * 1500, first_seed=0)
    lengths = [len(request.output_ids) for request in done]
    spread = statistics.pstdev(lengths) / len(lengths) ** 0.5
    assert statistics.fmean(lengths) == pytest.approx(TIMING.mean_length, abs=4 * spread)
    cut = statistics.fmean(request.finish_reason == {"type": "length", "length": 24} for request in done)
    assert cut == pytest.approx(TIMING.length_probabilities()[-1], abs=0.03)
    assert cut > 0.03
    again = responses(scheduler, [PROMPT] * 40, first_seed=0)
    assert [request.output_ids for request in again] == [request.output_ids for request in done[:40]]
    other = responses(scheduler, [PROMPT] * 40, first_seed=40)
    assert [request.output_ids for request in other] != [request.output_ids for request in done[:40]]


def test_a_continued_response_keeps_its_length(scheduler: Scheduler) -> None:
    whole = responses(scheduler, [PROMPT] * 40, first_seed=0)
    cut = responses(scheduler, [PROMPT] * 40, first_seed=0, steps=5)
    # An abort may arrive when a response ends; such a response does not continue.
    reasons = [(request, request.finish_reason or {}) for request in cut]
    unfinished = [request for request, reason in reasons if reason["type"] == "abort" and request.output_ids[-1] != END]
    assert 5 < len(unfinished) < 40
    rest = responses(scheduler, [PROMPT + request.output_ids for request in unfinished], first_seed=1000)
    for request, more in zip(unfinished, rest, strict=True):
        expected = whole[int(request.rid)].output_ids
        assert (request.output_ids + more.output_ids)[: TIMING.cap] == expected


def test_hidden_time_is_the_time_saved() -> None:
    """With 2 s of generation next to 1 s of training, a step of 3 s can come down to 2 s."""

    def run(step: float) -> Run:
        return Run([step, step], {"rollout": 2.0, "training": 1.0, "weight_sync": 0.0}, 0.0)

    assert [hidden_share(run(3.0), run(step)) for step in (2.0, 2.5, 3.0, 3.2)] == pytest.approx([1, 0.5, 0, -0.2])


def test_the_loops_flags_are_accepted_by_both_programs(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", TIMING, layers=1, hidden=32)
    prompts = make_prompts(tmp_path / "prompts.jsonl", 8, 4)
    shape, urls = Shape(prompts=2, samples=2, engines=1, slots=4), ["http://127.0.0.1:1"]
    engines: Any = SimpleNamespace(model=model, prompts=prompts, shape=shape, timing=TIMING, urls=urls)
    flags = loop_flags(engines, tmp_path / "run", rollouts=3)
    for ahead in (0, 1):
        args, _ = load_args(flags, rollouts_ahead=ahead)
        assert (args.rollout_batch_size, args.n_samples_per_prompt, args.rollout_max_response_len) == (2, 2, TIMING.cap)
        assert load_hook("custom_advantage_function_path", str(args.custom_advantage_function_path))


def test_the_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "rollout.json"
    command = [sys.executable, "-m", "bench.rollout_schedule", "--parts", "timed", "--prompts", "3", "--samples", "2"]
    command += ["--engines", "1", "--slots", "4", "--median", "20", "--cap", "60"]
    command += ["--step", "0.002", "--rollouts", "2", "--rounds", "1", "--warmup", "1", "--out", str(out)]
    command += ["--modes", "plain", "over-sampling × 1.5", PARTIAL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    for table in result["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
        assert table["title"] in done.stdout
    modes = result["raw"]["timed"]
    for name, mode in modes.items():
        assert all(rate > 0 for rate in mode["rates"]) and mode["generated"] > 0
        if name != "limit":
            assert len(mode["lengths"]) == 2 * 3 * 2
    plain, over, partial = (modes[name] for name in ("plain", "over-sampling × 1.5", PARTIAL))
    assert plain["generated"] == sum(plain["lengths"]) and plain["carried"] == plain["off_policy"] == 0
    assert over["generated"] > sum(over["lengths"]) and over["carried"] == over["off_policy"] == 0
    assert partial["generated"] == sum(partial["lengths"]) + partial["carried"] and partial["off_policy"] > 0
