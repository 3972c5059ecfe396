"""scripts/run-*.sh: each plans from any directory, later flags win, and small machines hold what theirs plan."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slime.cli.arithmetic import make_task
from slime.config.architecture import hf_architecture, read_hf_config
from slime.config.args import Args
from slime.plan.fit import load_run
from slime.plan.memory_model import engine_memory, train_memory
from slime.plan.summary import format_plan
from tests.gpu.runs import without

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("scripts/run-*.sh"))
WORDS_OF = 'python3() { printf "%s\\0" "$PWD" "$@"; }; exec() { "$@"; }; source "$0" "$@"'
H200 = 140 * 2**30


def words_of(script: str, *more: str, cwd: Path, **variables: str) -> tuple[Path, list[str]]:
    """Return the directory and the words with which a script would start its program."""
    environment = {"PATH": os.environ["PATH"], **variables}
    command = ["bash", "-euc", WORDS_OF.replace("$0", str(ROOT / "scripts" / script)), "bash", *more]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True)
    directory, program, *words = done.stdout.split("\0")[:-1]
    assert program == ("train_async.py" if "async" in script else "train.py")
    return Path(directory), words


def args_of(script: str, *more: str, cwd: Path, **variables: str) -> Args:
    _, words = words_of(script, "--dry-run", *more, cwd=cwd, **variables)
    return load_run(words)[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_plans(script: str, tmp_path: Path) -> None:
    directory, words = words_of(script, "--dry-run", "--prompt-data", "mine.jsonl", cwd=tmp_path)
    args, problems = load_run(words)
    assert directory == ROOT  # where train.py is
    assert args.prompt_data == "mine.jsonl"
    assert [str(problem) for problem in problems if problem.severity == "error"] == []
    text = format_plan(args, problems)
    assert "Memory" in text and "from mine.jsonl" in text
    assert args.architecture is not None


def test_a_small_machines_script_from_elsewhere(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_DIR": "model"}
    command = ["bash", str(ROOT / "scripts/run-qwen3-0.6B-1gpu.sh"), "--dry-run", "--num-rollout", "7"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "7 rollouts from /root/dapo-math-17k/dapo-math-17k.jsonl" in done.stdout
    assert f"--hf-checkpoint {tmp_path / 'model'}: there is no config.json" in done.stdout
    assert "shared with training" in done.stdout


def test_the_demos_mixture_of_experts(tmp_path: Path) -> None:
    """The script's MODEL_ARGS describe the model that the task is made with, and its experts are replayed."""
    model = make_task.make_model(1, "qwen3_moe")
    model.config.save_pretrained(tmp_path / "model")
    for script, variables in (("run-qwen3-moe-tiny-cpu.sh", {}), ("run-glm4-tiny-sft-cpu.sh", {"TASK_DIR": tmp_path})):
        paths = {"HF_DIR": tmp_path / "model", "MODEL": "qwen3-moe-tiny", **variables}
        _, words = words_of(script, "--dry-run", cwd=tmp_path, **{name: str(value) for name, value in paths.items()})
        args, problems = load_run(words)
        assert [str(problem) for problem in problems if problem.severity == "error"] == []
        assert args.hf_checkpoint == str(tmp_path / "model")
        assert args.architecture == hf_architecture(read_hf_config(tmp_path / "model"))
        assert args.architecture.num_parameters() == model.num_parameters()
        assert args.use_routing_replay == (not variables)


def test_the_demos_run_on_shared_devices(tmp_path: Path) -> None:
    """The checks on GPUs take the engines' devices out of the script's words; its YAML file must not name them too."""
    _, words = words_of("run-glm4-tiny-cpu.sh", cwd=tmp_path)
    shared = [*without(words, "--rollout-num-gpus", "--save-interval"), "--colocate", "--dry-run"]
    args, _ = load_run(shared)
    assert (args.colocate, args.save_interval, args.num_rollout) == (True, None, 50)


@pytest.mark.parametrize(
    ("script", "gpus", "family"), [("run-qwen3-0.6B-1gpu.sh", 1, "qwen3"), ("run-glm4-9B-2gpu.sh", 2, "glm4")]
)
def test_small_machines(script: str, gpus: int, family: str, tmp_path: Path) -> None:
    args = args_of(script, cwd=tmp_path, HF_DIR="model", PROMPT_DATA="data.jsonl", SAVE_DIR="out")
    assert (args.colocate, args.offload, args.actor_world_size, args.num_engines) == (True, True, gpus, 1)
    assert (args.rollout_engine, args.bf16, args.tensor_model_parallel_size) == ("sglang", True, gpus)
    assert args.architecture is not None
    assert args.architecture.family == family
    paths = (args.hf_checkpoint, args.ref_load, args.prompt_data, args.load, args.save)
    assert paths == tuple(str(tmp_path / name) for name in ("model", "model", "data.jsonl", "out", "out"))
    unsaved = args_of(script, cwd=tmp_path, SAVE_DIR="")
    assert (unsaved.save, unsaved.load, unsaved.saves) == (None, None, False)
    assert not unsaved.eval_prompt_data
    assert args_of(script, cwd=tmp_path, EVAL_DATA="e.jsonl").eval_prompt_data == (
        "held-out",
        str(tmp_path / "e.jsonl"),
    )

    train, engine = train_memory(args, on_cuda=True), engine_memory(args)
    assert train is not None and engine is not None
    assert train.peak < 0.8 * H200
    # SGLang's share holds its weights, and KV for all but a seventh of a rollout of longest responses
    assert 0.85 * engine.peak < args.sglang["mem_fraction_static"] * H200
