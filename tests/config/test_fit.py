"""The check of whether a plan fits in a GPU: limits of errors and warnings, and proposals that do what they promise."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from config_run import Run
from test_page import COLOCATED, DECOUPLED, page_words
from test_plan import PAGE

from slime.config.args import Args
from slime.config.parse import UsageError
from slime.config.problem import Problem
from slime.config.resolve import cuda_available
from slime.plan.fit import GIB, fullest, load_run, memory_problems, moments, recompute_hint

H100 = 79.6
SHARED: dict[str, Any] = {"colocate": True, "offload": True, "sglang": {"mem_fraction_static": 0.7}}


def planned(args: Args, name: str) -> int:
    """Return the bytes of one moment."""
    [moment] = [moment for moment in moments(args, H100) if moment.name == name]
    return moment.planned


def check(args: Args, size: float, **more: Any) -> list[Problem]:
    return memory_problems(replace(args, gpu_memory=size, **more), [])


@pytest.mark.parametrize("shared", [{}, SHARED], ids=["decoupled", "colocated"])
def test_limits_of_warnings_and_errors(shared: dict[str, Any]) -> None:
    args = replace(PAGE, log_probs_chunk_size=8192, **shared)
    whole = planned(args, "training") / GIB
    found = {percent: check(args, whole * 100 / percent) for percent in (91.9, 92, 100, 100.1)}
    assert [[problem.severity for problem in problems] for problems in found.values()] == [
        [],
        ["warning"],
        ["warning"],
        ["error"],
    ]
    [problem] = found[100.1]
    assert f"training {whole:.1f} GiB (100.1 %)" in problem.rule
    assert "--no-memory-check" in problem.remedy
    [problem] = check(args, whole / 1.5, memory_check=False)
    assert (problem.severity, "--no-memory-check" in problem.remedy) == ("warning", False)


@pytest.mark.parametrize(
    ("flags", "gib"),
    [("--no-use-distributed-optimizer", 82.4), ("", 56.1), ("--no-use-distributed-optimizer --colocate", None)],
)
def test_the_page_on_80_gb(flags: str, gib: float | None) -> None:
    front = DECOUPLED if gib is not None else COLOCATED
    words = [*page_words(front), "--dry-run", "--gpu-memory", str(H100), *flags.split()]
    try:
        args, problems = load_run(words)
    except UsageError as error:
        [problem] = error.problems
        assert problem.where == "--gpu-memory" and "--use-distributed-optimizer: " in problem.remedy
        assert gib is None or f"training {gib} GiB (103.5 %)" in problem.rule
        return
    assert gib == 56.1
    assert (args.bf16, args.rollout_engine, args.use_distributed_optimizer) == (True, "sglang", True)
    assert not [problem for problem in problems if problem.where == "--gpu-memory"]
    assert f"{planned(args, 'training') / GIB:.1f}" == "56.1"
    hint = recompute_hint(args, H100)
    assert hint == (
        "hint: without recomputation it would need 68.3 GiB (85.8 %), which fits, and a training step would take "
        "about 25 % less time"
    )
    # with less room, some layers are recomputed; without room there is no hint
    less = recompute_hint(args, 70)
    assert less is not None
    layers = int(re.findall(r"--recompute-method block --recompute-num-layers (\d+)", less)[0])
    assert 0 < layers < 40 and f"about {25 * (1 - layers / 40):.0f} % less time" in less
    half = replace(args, recompute_method="block", recompute_num_layers=20)
    assert "about 14 % less time" in str(recompute_hint(half, H100))  # half of one of 3.5 forward passes
    assert "would take less time" in str(recompute_hint(replace(args, recompute_granularity="selective"), H100))
    assert recompute_hint(replace(args, debug_rollout_only=True), H100) is None
    assert recompute_hint(args, 61.5) is None
    assert recompute_hint(replace(args, recompute_granularity=None), H100) is None


CASES: dict[str, tuple[str, str, float]] = {
    "optimizer": (DECOUPLED, "--no-use-distributed-optimizer", H100),
    "activations": (DECOUPLED, "--max-tokens-per-gpu 120000", H100),
    "no recompute": (
        DECOUPLED,
        "--recompute-method block --max-tokens-per-gpu 9216",
        70,
    ),
    "several": (COLOCATED, "--no-offload --sglang-mem-fraction-static 0.8", H100),
    "engine too large": (COLOCATED, "--sglang-mem-fraction-static 0.98", H100),
    "engine too small": (DECOUPLED, "--sglang-mem-fraction-static 0.1", H100),
    "tensor parallel": (DECOUPLED.replace("4", "8"), "--tensor-model-parallel-size 1 --context-parallel-size 1", 60),
}


@pytest.mark.parametrize("case", CASES)
def test_proposed_changes_help(case: str) -> None:
    """Every proposal, appended to the flags, gives the memory that it promises."""
    front, flags, size = CASES[case]
    words = [*page_words(front), "--dry-run", "--gpu-memory", str(size)]
    words += flags.split()
    with pytest.raises(UsageError) as caught:
        load_run(words)
    [problem] = caught.value.problems
    proposals = re.findall(r"(--[^:;]+?)(?: together)?: ([^;]*?)([\d.]+) GiB \(([\d.]+) %\)", problem.remedy)
    assert proposals, problem
    for proposal, _, gib, percent in proposals:
        args, _ = load_run([*words, *proposal.split()])
        after = fullest(moments(args, size))
        assert (f"{after.planned / GIB:.1f}", f"{100 * after.share:.1f}") == (gib, percent), proposal
        assert after.share <= 1


def test_an_engine_is_counted_by_its_share() -> None:
    """An engine is not counted by the KV cache of all requests, because SGLang queues requests that do not fit."""
    args = replace(PAGE, use_distributed_optimizer=True, **SHARED)
    assert planned(args, "generating") == int(0.7 * int(H100 * GIB)) + 3 * GIB
    assert planned(replace(args, rollout_max_response_len=32000), "generating") == planned(args, "generating")
    few = replace(args, sglang={"mem_fraction_static": 0.7, "max_total_tokens": 1000})
    assert planned(few, "generating") < planned(args, "generating") / 3
    assert [moment.name for moment in moments(replace(args, offload=False), H100)] == ["always"]
    assert [moment.name for moment in moments(PAGE, H100)] == ["training"]  # SGLang chooses a share that fits
    apart = replace(PAGE, use_distributed_optimizer=True, sglang={"mem_fraction_static": 0.99})
    assert [moment.name for moment in moments(apart, H100) if moment.share > 1] == ["the engine"]
    assert moments(replace(PAGE, architecture=None), H100) == []


def test_an_impossible_memory_share_is_refused(run: Run) -> None:
    words = ("--gpu-memory", "80", "--dry-run", "--sglang-mem-fraction-static")
    for share in ("0", "1"):
        assert run.error(*words, share).startswith(f"--sglang-mem-fraction-static {share}: is not a fraction of a GPU")
    assert run.errors(*words, "0.5") == []


def test_all_problems_at_once(run: Run) -> None:
    words = ("--gpu-memory", "0.5", "--bf16", "--rollout-engine", "sglang", "--dry-run")
    assert run.error(*words).startswith("--gpu-memory 0.5: the plan needs more than the GPU has: training 1.5 GiB")
    both = run.errors(*words, "--rollout-top-p", "0.5")
    assert [error.split()[0] for error in both] == ["--rollout-top-p", "--gpu-memory"]
    # with contradicting sizes there is no plan to check
    wrong = run.errors(*words, "--tensor-model-parallel-size", "3")
    assert {error.split()[0] for error in wrong} == {"--tensor-model-parallel-size"}
    assert run.error(*words, "--max-tokens-per-gpu", "x").startswith("--max-tokens-per-gpu x")
    assert run.warnings(*words, "--no-memory-check")[-1].startswith("--gpu-memory 0.5: the plan needs more")


@pytest.mark.skipif(cuda_available(), reason="is about a machine without CUDA")
def test_a_cpu_run_needs_no_gpu_memory(run: Run) -> None:
    assert "--gpu-memory 1: no effect" in " ".join(run.warnings("--gpu-memory", "1"))
    assert "--no-memory-check: no effect" in " ".join(run.warnings("--no-memory-check"))
