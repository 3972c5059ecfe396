"""The page's command lines, word for word, plan on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from config_run import ROOT

from slime.config.args import Args
from slime.config.args_yaml import dump_args
from slime.config.parse import UsageError
from slime.plan.fit import load_run
from slime.plan.summary import format_plan

PAGE = Path(__file__).parent / "page_arrays.sh"
ARRAYS = [
    "MODEL_ARGS",
    "CKPT_ARGS",
    "ROLLOUT_ARGS",
    "EVAL_ARGS",
    "PERF_ARGS",
    "GRPO_ARGS",
    "OPTIMIZER_ARGS",
    "SGLANG_ARGS",
]
DECOUPLED = "--actor-num-nodes 1 --actor-num-gpus-per-node 4 --rollout-num-gpus 4"
COLOCATED = "--actor-num-nodes 1 --actor-num-gpus-per-node 8 --colocate"
DYNAMIC_SAMPLING = (
    "--over-sampling-batch-size ${OVER_SAMPLING_BS} --dynamic-sampling-filter-path "
    "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std "
    "--rollout-batch-size 32 --n-samples-per-prompt 8 --over-sampling-batch-size 64"
)


def page_words(front: str, *, more: str = "", model: str = "") -> list[str]:
    """Return the words that bash makes of the page's arrays, unquoted as the page writes them."""
    expanded = " ".join(f"${{{name}[@]}}" for name in ARRAYS)
    script = f"""
    OVER_SAMPLING_BS=64
    source scripts/models/glm4-9B.sh
    {model}
    source {PAGE}
    printf '%s\\0' {front} {expanded} {more}
    """
    done = subprocess.run(["bash", "-euc", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def plan(words: list[str]) -> tuple[Args, str]:
    args, problems = load_run([*words, "--dry-run"])
    return args, format_plan(args, problems)


def test_decoupled() -> None:
    args, text = plan(page_words(DECOUPLED))
    assert (args.data_parallel_size, args.num_engines, args.global_batch_size) == (1, 2, 256)
    for expected in (
        "glm4, 9,400.3 M parameters",
        "train 0-3      data-parallel rank 0: TP 2, sequence parallel, CP 2, PP 1",
        "serve 4-5      engine 0: TP 2",
        "serve 6-7      engine 1: TP 2",
        "32 prompts x 8 samples = 256 samples",
        "1 a rollout, 256 samples each",
        "up to 9216 tokens (4608 x CP 2)",
        "16 samples a prompt, up to 16384 tokens each, temperature 0.8, top-p 0.7",
        "reference KL is off",
    ):
        assert expected in text


def test_only_the_distributed_optimizer_resolves_differently() -> None:
    """The file has all flags of the page's run on CUDA from before --use-distributed-optimizer became the default."""
    before = yaml.safe_load((Path(__file__).parent / "page_args.yaml").read_text())
    words = [*page_words(DECOUPLED), "--dry-run", "--gpu-memory", "79.6"]
    now = yaml.safe_load(dump_args(load_run(words)[0]))
    machine = {"cpu_threads_per_process"}  # depends on the number of cores
    changed = {name for name in {*before} - machine if now[name] != before[name]}
    assert changed == {"use_distributed_optimizer"}
    assert (before["use_distributed_optimizer"], now["use_distributed_optimizer"]) == (False, True)
    off = yaml.safe_load(dump_args(load_run([*words, "--no-use-distributed-optimizer", "--no-memory-check"])[0]))
    assert not {name for name in {*before} - machine if off[name] != before[name]}


def test_colocated() -> None:
    args, text = plan(page_words(COLOCATED, more="--sglang-mem-fraction-static 0.7"))
    assert (args.data_parallel_size, args.num_engines, args.offload) == (2, 4, True)
    assert "train 4-7" in text
    assert "serve 0-1      engine 0: TP 2 (shared with training" in text


def test_colocated_is_not_decoupled() -> None:
    with pytest.raises(UsageError, match="append --no-rollout-num-gpus, which takes it back"):
        plan(page_words(f"{COLOCATED} --rollout-num-gpus 4"))


def test_rotary_base_override() -> None:
    args, _ = plan(page_words(DECOUPLED, model="MODEL_ARGS+=( --rotary-base 5000 )"))
    assert args.rotary_base == 5000
    assert plan(page_words(DECOUPLED, model="MODEL_ARGS+=( --rotary-base 10000 )"))[0].rotary_base == 10000


def test_dynamic_sampling_and_partial_rollout() -> None:
    more = (
        f"{DYNAMIC_SAMPLING} --partial-rollout --buffer-filter-path slime.rollout.filter_hub.buffer_filters.pop_first"
    )
    args, text = plan(page_words(DECOUPLED, more=more))
    assert (args.over_sampling_batch_size, args.partial_rollout) == (64, True)
    assert "64 prompts at first, filter: slime.rollout.filter_hub" in text


def test_a_real_run_names_what_is_missing() -> None:
    """Control: without --dry-run the same words are refused, with all reasons at once."""
    with pytest.raises(UsageError) as caught:
        load_run(page_words(DECOUPLED))
    text = str(caught.value)
    for expected in ("--hf-checkpoint /root", "--prompt-data /root", "--ref-load /root"):
        assert expected in text


def test_the_script_is_the_page() -> None:
    script = (ROOT / "scripts" / "run-glm4-9B.sh").read_text()
    words = [line.strip() for line in script.splitlines()]
    missing = [line for line in PAGE.read_text().splitlines()[1:] if line.strip() not in words]
    assert missing == []


@pytest.mark.parametrize(
    ("script", "model"),
    [("run-qwen2.5-0.5B.sh", "qwen2, 494.0 M parameters"), ("run-llama3.2-1B.sh", "llama, 1,235.8 M parameters")],
)
def test_other_scripts_plan(script: str, model: str) -> None:
    """The words that a script would pass to train.py give a plan."""
    command = ["bash", "-euc", f'python3() {{ printf \'%s\\0\' "$@"; }}; exec() {{ "$@"; }}; source scripts/{script}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    program, *words = done.stdout.split("\0")[:-1]
    args, text = plan(words)
    assert program == "train.py"
    assert model in text
    assert (args.data_parallel_size, args.num_engines, args.global_batch_size) == (2, 2, 256)


@pytest.mark.parametrize("address", ["", "http://127.0.0.1:9"])
def test_the_script_plans(address: str) -> None:
    """The plan runs locally even if RAY_ADDRESS names a job server; no server listens at that address."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["RAY_ADDRESS"] = address
    command = ["bash", "scripts/run-glm4-9B.sh", "--dry-run", "--num-rollout", "7"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "7 rollouts from /root/dapo-math-17k/dapo-math-17k.jsonl" in done.stdout
