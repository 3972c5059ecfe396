"""Real runs of train.py and train_async.py on a tiny model: Ray, router, engines and trainers as separate processes."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import psutil
import pytest
import ray

from slime.core.sample import Sample
from slime.observability.metrics_log import read_metrics

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[2]
RUN_TIMEOUT_S = 240.0
"""Seconds for anything that a whole run does; the machine may be busy with other tests."""
JOINED = "SLIME_TEST_JOINED_"
"""The prefix of Ray's environment variables with which a test's runs join a Ray."""


@dataclass(frozen=True)
class Task:
    """A tiny GLM-4 with random weights, a second one, and arithmetic problems."""

    model: Path
    other_model: Path
    train: Path
    eval: Path


MAKE_TASKS = """
import runpy, sys
script, directory = sys.argv[1:]
for name, seed in (("task", "0"), ("other", "1")):
    sys.argv[1:] = ["--out", f"{directory}/{name}", "--seed", seed, "--num-demonstrations", "1"]
    runpy.run_path(script, run_name="__main__")
"""


def make_task(directory: Path) -> Task:
    """Make both models in one process, whose imports take seconds."""
    script = ROOT / "examples/arithmetic/make_task.py"
    subprocess.run([sys.executable, "-c", MAKE_TASKS, script, directory], check=True, cwd=ROOT)
    return _task_in(directory)


def _task_in(directory: Path) -> Task:
    task = directory / "task"
    return Task(task / "model", directory / "other" / "model", task / "train.jsonl", task / "eval.jsonl")


def shared_directory(factory: pytest.TempPathFactory) -> Path:
    """Return the directory for what all of pytest's processes share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # each worker has its own directory in it


@contextmanager
def locked(file: IO[str]) -> Generator[None]:
    """Keep other processes out of blocks with a lock on the same file."""
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def shared_task(factory: pytest.TempPathFactory) -> Task:
    """Return the task, made once for all of pytest's processes, by the first that needs it."""
    base = shared_directory(factory)
    directory = base / "shared-task"
    with (base / "shared-task.lock").open("w") as lock, locked(lock):
        if not directory.exists():
            made = factory.mktemp("task")
            make_task(made)
            made.rename(directory)
    return _task_in(directory)


SMALL = ("--actor-num-gpus-per-node", "1", "--rollout-num-gpus", "1")
"""One trainer and one engine: each more is a process whose start takes seconds of a core."""


def flags(task: Task, save: Path, *extra: str, length: Sequence[str] = ("--num-rollout", "4")) -> list[str]:
    """Return flags of a short GRPO run: 2 trainers, 2 engines, 4 prompts x 4 samples, rewards that always differ."""
    return [
        *("--hf-checkpoint", str(task.model), "--ref-load", str(task.model)),
        *("--load", str(save), "--save", str(save), "--save-interval", "2"),
        *("--prompt-data", str(task.train), "--input-key", "prompt", "--label-key", "label"),
        *("--apply-chat-template", "--rollout-shuffle", "--rm-type", "random", "--rm-num-workers", "1", *length),
        *("--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--rollout-max-response-len", "24"),
        *("--rollout-temperature", "0.8", "--actor-num-gpus-per-node", "2", "--rollout-num-gpus", "2"),
        *("--use-dynamic-batch-size", "--max-tokens-per-gpu", "512", "--lr", "1e-3"),
        *extra,
    ]


def without(arguments: list[str], name: str, values: int = 1) -> list[str]:
    """Return the arguments without the flag `name` and its values."""
    at = arguments.index(name)
    return arguments[:at] + arguments[at + 1 + values :]


@contextmanager
def small_ray(num_gpus: int | None = None) -> Generator[None]:
    """Start a local Ray in this process; `num_gpus` is how many GPUs it believes in, None what it finds."""
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=num_gpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 * 1024**2,
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()


@contextmanager
def own_ray() -> Generator[pytest.MonkeyPatch]:
    """Let runs that start inside have a Ray of their own, also where others of the module join one."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(JOINED)]:
            patch.delenv(name)
        yield patch


def environment() -> dict[str, str]:
    """Return a run's environment: with its own Ray, or, with the fixture `joined_ray`, with a running one."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    joined = {key.removeprefix(JOINED): value for key, value in env.items() if key.startswith(JOINED)}
    return {**env, **joined, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}


def start(arguments: list[str], log: Path, program: str = "train.py", *, cwd: Path = ROOT) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, str(ROOT / program), *arguments],
            cwd=cwd,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=as_in_a_terminal,
        )


def as_in_a_terminal() -> None:
    """Restore Ctrl-C: a shell that starts tests in the background ignores it, also for their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def train(arguments: list[str], log: Path, program: str = "train.py", *, cwd: Path = ROOT) -> str:
    """Run the program to its end and return its output; fail the test if the program fails."""
    code = start(arguments, log, program, cwd=cwd).wait(timeout=RUN_TIMEOUT_S)
    output = log.read_text()
    assert code == 0, f"{program} ended with {code}:\n{output[-6000:]}"
    return output


def events(save: Path, key: str) -> dict[int, float]:
    """Return the metric `key` by step."""
    return {int(event["step"]): event[key] for event in read_metrics(save / "metrics.jsonl") if key in event}


def log_probs(model: Path, sample: Sample) -> torch.Tensor:
    """Return Hugging Face's log-probs of the sample's response tokens, at its temperature."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = torch.tensor([sample.tokens])
    with torch.no_grad():
        scores = torch.log_softmax(network(tokens).logits[0, :-1] / 0.8, dim=-1)
    return scores.gather(-1, tokens[0, 1:, None])[sample.prompt_length - 1 :, 0]


def copy_checkpoint(source: Path, target: Path, rollout_id: int) -> None:
    """Make `target` as if the run in `source` had been killed right after this checkpoint, or a little later."""
    target.mkdir()
    name = f"iter_{rollout_id:07d}"
    shutil.copytree(source / name, target / name)
    (target / "latest_checkpointed_iteration.txt").write_text(str(rollout_id))
    for file in ("metrics.jsonl", "samples.jsonl", "run.json"):
        shutil.copy(source / file, target / file)


def wait_for(condition: Callable[[], bool], what: str, timeout: float = RUN_TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout:.0f} s"
        time.sleep(0.1)


def family(pid: int) -> list[psutil.Process]:
    """Return the process and all its descendants."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def marked(marker: str) -> list[psutil.Process]:
    """Return processes with `marker` in their environment: a run's own, whatever their parent is now."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if marker in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found
