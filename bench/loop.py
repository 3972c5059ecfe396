"""slime's whole loop against TRL's GRPOTrainer: the same start, task, batch, sampling, loss and optimizer.

    python -m bench.loop              (make bench-loop)

The runs alternate, A B A B. Each side runs in both ways to use all cores: one training process with a thread for each
core, and a training process with one thread for each core. slime has one engine in addition; TRL generates in its
training processes. Both save their weights every few steps; after the runs, one evaluator judges those weights.
Invariant: evaluation and saving count for neither side; everything else between two optimizer steps does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from bench.common import OUTPUTS, ROOT, Goal, Spread, Table, machine, ratios, thread_cpu_seconds, write_result
from slime.config.architecture import hf_architecture, read_hf_config
from slime.engine.embedded.in_process import InProcessEngine
from slime.engine.protocol import SamplingParams
from slime.engine.server_process import find_free_port
from slime.models.hf_files import HFReader
from slime.rollout.rewards.deepscaler import deepscaler

GOAL = 1.5
TARGET = 0.8
SAMPLES = 32 * 8
LONGEST = 40
WARMUP = 3
"""Steps at the start of a run that are not counted: imports, allocators, first use of memory."""
PHASES = ("generation", "reward", "training", "weight_sync", "idle")
ROLES = {
    "slime.engine.embedded.server": "engine",
    "sglang::router": "router",
    "ray::TrainWorker": "trainer",
    "ray::RolloutManager": "rollout manager",
    "reward_pool": "reward workers",
    "raylet": "Ray",
    "gcs_server": "Ray",
    "train.py": "driver",
    "ray": "Ray",
}


@dataclass
class Run:
    """The seconds and inner parts of each step, and the directory with the weights of some steps."""

    seconds: list[float] = field(default_factory=list[float])
    parts: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    engine_busy: list[float] = field(default_factory=list[float])
    cpu: dict[str, float] = field(default_factory=dict[str, float])
    """CPU seconds per step after the warm-up, by role."""
    lengths: list[float] = field(default_factory=list[float])
    weights: Path = Path()

    def median(self) -> float:
        """Return the median seconds of the counted steps."""
        return statistics.median(self.seconds[WARMUP:])


class Processes:
    """CPU time of a run's processes by role. The engine's steps run in one thread, whose CPU time is its busy time."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)

    def sample(self) -> tuple[dict[str, float], float]:
        spent: dict[str, float] = {}
        busy = 0.0
        for process in (self._root, *self._root.children(recursive=True)):
            try:
                line = " ".join(process.cmdline())
                times = process.cpu_times()
                role = next((role for mark, role in ROLES.items() if mark in line), "other")
                spent[role] = spent.get(role, 0.0) + times.user + times.system
                if role == "engine" and "guard" not in line:
                    threads = thread_cpu_seconds(process.pid)
                    busy += max((cpu for thread, cpu in threads.items() if thread != process.pid), default=0.0)
            except (psutil.Error, OSError):
                continue  # it has ended in the meantime
        return spent, busy


def run_slime(
    start: Path, task: Path, out: Path, *, steps: int, every: int, processes: int, cores: int, seed: int
) -> Run:
    """Run the demo's GRPO script once, with `processes` training processes and one engine."""
    command = ["bash", "scripts/run-glm4-tiny-cpu.sh"]
    command += ["--actor-num-gpus-per-node", str(processes), "--rollout-num-gpus", "1"]
    command += ["--cpu-threads-per-process", str(cores // processes), "--max-tokens-per-gpu", "1536"]
    command += ["--num-rollout", str(steps), "--save-interval", str(every), "--keep-last-checkpoints", "1"]
    command += ["--save-hf", f"{out}/hf/{{rollout_id}}", "--skip-eval-before-train", "--eval-interval", "100000"]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TASK_DIR": str(task),
        "HF_DIR": str(start),
        "REF_DIR": str(start),
        "SAVE_DIR": str(out / "run"),
        "SEED": str(seed),
    }
    run = Run(weights=out / "hf")
    out.mkdir(parents=True)
    with (out / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        running = Processes(process.pid)
        marks: list[tuple[dict[str, float], float]] = []
        try:
            for record in follow(out / "run" / "metrics.jsonl", process):
                if "rollout/response_length" in record:
                    run.lengths.append(record["rollout/response_length"])
                if "time/step" in record:
                    marks.append(running.sample())
                    run.seconds.append(record["time/step"] - record["time/checkpoint"] - record["time/evaluation"])
                    run.parts.append({phase: record[f"time/{phase}"] for phase in PHASES})
        finally:
            if process.poll() is None:
                process.terminate()
            code = process.wait()
    if code != 0 or len(run.seconds) != steps:
        raise RuntimeError(f"slime's run ended with code {code} after {len(run.seconds)} steps; see {out / 'log'}")
    # the last mark includes the last evaluation
    run.engine_busy = [later[1] - earlier[1] for earlier, later in pairwise(marks[:-1])]
    first, last = marks[WARMUP][0], marks[-2][0]
    run.cpu = {role: (last[role] - first.get(role, 0.0)) / (steps - 2 - WARMUP) for role in last}
    return run


def follow(path: Path, process: subprocess.Popen[bytes]) -> Iterator[dict[str, float]]:
    """Yield the lines of a growing file until the process ends."""
    while not path.is_file() and process.poll() is None:
        time.sleep(0.02)
    if not path.is_file():
        return
    with path.open() as file:
        rest = ""
        while True:
            ended = process.poll() is not None
            rest += file.read()
            *lines, rest = rest.split("\n")
            yield from map(json.loads, lines)
            if ended:
                return
            time.sleep(0.02)


def run_trl(
    python: Path, start: Path, task: Path, out: Path, *, steps: int, every: int, processes: int, cores: int, seed: int
) -> Run:
    command = [str(python), "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(find_free_port()), "-m"]
    command += ["bench.trl_grpo", "--model", str(start), "--data", str(task / "train.jsonl")]
    command += ["--out", str(out), "--steps", str(steps), "--save-every", str(every)]
    threads = str(cores // processes)
    command += ["--threads", threads, "--seed", str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}
    out.mkdir(parents=True)
    with (out / "log").open("wb") as log:
        code = subprocess.call(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if code != 0:
        raise RuntimeError(f"TRL's run ended with code {code}; see {out / 'log'}")
    run = Run(weights=out / "hf")
    for line in (out / "steps.jsonl").read_text().splitlines():
        record = json.loads(line)
        run.seconds.append(record["seconds"])
        inner = {"generation": record["generation"], "reward": record["reward"]}
        run.parts.append({**inner, "training": record["seconds"] - sum(inner.values())})
        run.lengths.append(record["length"])
    return run


class Judge:
    """Answers the held-out problems with any HF directory, sampled and greedy, and judges them by the task's reward."""

    def __init__(self, start: Path, task: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(start)
        config = read_hf_config(start)
        self._architecture = hf_architecture(config)
        self._stop = config["eos_token_id"]
        lines = [json.loads(line) for line in (task / "eval.jsonl").read_text().splitlines()]
        self._labels = [line["label"] for line in lines]
        self._prompts = [self._encode(line["prompt"]) for line in lines]

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._tokenizer.encode(text, add_special_tokens=False)

    def score(self, weights: Path, *, temperature: float) -> float:
        """Return the mean reward."""
        engine = InProcessEngine(self._architecture, rows=512, context=64, stop_token_ids=self._stop)
        reader = HFReader(weights)
        engine.update_weights({name: reader.get(name) for name in reader.names()}, version=0)
        params = SamplingParams(temperature=temperature, max_new_tokens=LONGEST)
        requests = engine.generate(self._prompts, params, seed=0)
        engine.close()
        responses = [self._tokenizer.decode(request.output_ids, skip_special_tokens=True) for request in requests]
        rewards = [deepscaler(response, label) for response, label in zip(responses, self._labels, strict=True)]
        return statistics.fmean(rewards)


def curve(judge: Judge, run: Run, start: tuple[float, float], *, offset: int) -> list[tuple[int, float, float, float]]:
    """Return (step, seconds of training until then, sampled, greedy) for each step whose weights were saved."""
    points = [(0, 0.0, *start)]
    # next to them is the lock of the run that has written them
    saved = [path for path in run.weights.iterdir() if path.name.isdigit()]
    for directory in sorted(saved, key=lambda path: int(path.name)):
        step = int(directory.name) + offset
        scores = judge.score(directory, temperature=1.0), judge.score(directory, temperature=0.0)
        points.append((step, sum(run.seconds[:step]), *scores))
    return points


def time_to(points: list[tuple[int, float, float, float]], target: float) -> tuple[int, float] | None:
    """Return the steps and seconds until the sampled score first reaches `target`."""
    return next(((step, seconds) for step, seconds, sampled, _ in points if sampled >= target), None)


def speed_table(runs: dict[str, list[Run]], cores: int) -> tuple[Table, Spread]:
    """Return the speed of all runs, and slime's over TRL's: in each turn the faster way of each side."""
    table = Table(
        f"Whole loop, {cores} cores each: {SAMPLES} samples a step",
        ["run", "rollouts/s", "seconds a step", "response tokens a sample", "of it generation", "training", "rest"],
        note=f"Steps after the first {WARMUP}; a step's time includes everything but evaluation and saving.",
    )
    rates: dict[str, list[float]] = {}
    for side, several in runs.items():
        for number, run in enumerate(several):
            seconds = run.seconds[WARMUP:]
            rates.setdefault(side, []).append(SAMPLES / statistics.median(seconds))
            parts = run.parts[WARMUP:]
            inner = {name: statistics.median(part[name] for part in parts) for name in ("generation", "training")}
            step = Spread.of(seconds)
            length = statistics.fmean(run.lengths[WARMUP:])
            row = [f"{side} {number + 1}", f"{rates[side][-1]:,.0f}", step.show(2), f"{length:.1f}"]
            shares = [*inner.values(), step.median - sum(inner.values())]
            table.rows.append([*row, *(f"{share:.2f}" for share in shares)])
    best = {name: [max(turn) for turn in zip(*_of(rates, name), strict=True)] for name in ("slime", "TRL")}
    return table, ratios(best["slime"], best["TRL"])


def _of(found: dict[str, list[Any]], side: str) -> list[list[Any]]:
    return [several for name, several in found.items() if name.startswith(side)]


def reach_table(judge: Judge, runs: dict[str, list[Run]], start: Path, raw: dict[str, Any]) -> Table:
    table = Table(
        f"Until the held-out problems' mean reward, sampled at temperature 1, is {TARGET}",
        ["run", "steps", "seconds", "sampled, greedy at the start", "at the end"],
        note="Weights are judged after the runs, by one evaluator for both; seconds are those of training alone.",
    )
    first = judge.score(start, temperature=1.0), judge.score(start, temperature=0.0)
    for side, several in runs.items():
        for number, run in enumerate(several):
            points = curve(judge, run, first, offset=1 if side.startswith("slime") else 0)
            raw[f"{side} {number + 1}"]["curve"] = points
            reached = time_to(points, TARGET)
            steps, seconds = ("not", "reached") if reached is None else (str(reached[0]), f"{reached[1]:.0f}")
            end = f"{points[-1][2]:.2f}, {points[-1][3]:.2f}"
            table.rows.append([f"{side} {number + 1}", steps, seconds, f"{first[0]:.2f}, {first[1]:.2f}", end])
    return table


def overhead_tables(runs: list[Run]) -> tuple[Table, Table, float]:
    """Return the parts of slime's step, and the share of it in which neither engine nor trainer computes."""
    table = Table(
        "slime's own overhead, in its faster way: the part of a step in which neither engine nor trainer computes",
        ["part", "ms a step", "share"],
        note="Medians by the step's clock. The engine computes while its scheduler's thread has a core.",
    )
    parts = [part for run in runs for part in run.parts[WARMUP:]]
    means = {name: statistics.median(part[name] for part in parts) for name in PHASES}
    busy = statistics.median(value for run in runs for value in run.engine_busy[WARMUP:])
    step = sum(means.values())
    busy = min(busy, means["generation"])
    rows = {
        "trainer computes": means["training"],
        "engine computes": busy,
        "generation, engine waits: HTTP, router, tokens to text": means["generation"] - busy,
        "rewards alone": means["reward"],
        "weight sync": means["weight_sync"],
        "rest: driver, object store, data": means["idle"],
    }
    table.rows = [[name, f"{1e3 * seconds:,.0f}", f"{seconds / step:.1%}"] for name, seconds in rows.items()]
    overhead = 1 - (means["training"] + busy) / step
    table.rows.append(["**overhead**", f"{1e3 * overhead * step:,.0f}", f"{overhead:.1%}"])
    roles = sorted({role for run in runs for role in run.cpu})
    spent = {role: statistics.median(run.cpu.get(role, 0.0) for run in runs) for role in roles}
    cpu = Table("CPU seconds of slime's processes, a step", [*roles, "all"])
    cpu.rows = [[f"{value:.2f}" for value in (*spent.values(), sum(spent.values()))]]
    return table, cpu, overhead


def ensure_start(seed: int) -> tuple[Path, Path]:
    """Make the demo's task and the model after its supervised start, unless they exist."""
    directory = ROOT / "outputs" / f"demo-seed{seed}"
    task, start = directory / "task", directory / "sft" / "hf"
    if not (start / "config.json").is_file():
        shutil.rmtree(directory, ignore_errors=True)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "SEED": str(seed)}
        make = [sys.executable, "examples/arithmetic/make_task.py", "--out", str(task), "--seed", str(seed)]
        subprocess.run(make, cwd=ROOT, env=environment, check=True)
        subprocess.run(["bash", "scripts/run-glm4-tiny-sft-cpu.sh"], cwd=ROOT, env=environment, check=True)
    return start, task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl" / "bin" / "python")
    parser.add_argument("--start", type=Path, help="HF directory to start from; unset: the demo's, made if need be")
    parser.add_argument("--task", type=Path, help="directory of its problems")
    parser.add_argument("--pairs", type=int, default=2, help="runs of each side")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--every", type=int, default=2, help="steps between two kept sets of weights")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=OUTPUTS / "loop.json")
    given = parser.parse_args()
    facts = machine() | trl_versions(given.trl_python)
    start, task = (given.start, given.task) if given.start is not None else ensure_start(1)
    out = given.out.with_suffix("")
    shutil.rmtree(out, ignore_errors=True)
    options = {"steps": given.steps, "every": given.every, "cores": given.cores}
    runs: dict[str, list[Run]] = {}
    for number in range(1, given.pairs + 1):
        for processes in (1, given.cores):
            way = options | {"processes": processes, "seed": number}
            named = f"{processes} × {given.cores // processes} threads"
            ours, theirs = (out / f"{side}-{processes}-{number}" for side in ("slime", "trl"))
            runs.setdefault(f"slime, {named}", []).append(run_slime(start, task, ours, **way))
            runs.setdefault(f"TRL, {named}", []).append(run_trl(given.trl_python, start, task, theirs, **way))
    raw: dict[str, Any] = {
        f"{side} {number + 1}": {"seconds": run.seconds, "parts": run.parts, "lengths": run.lengths, "cpu": run.cpu}
        for side, several in runs.items()
        for number, run in enumerate(several)
    }
    speed, ratio = speed_table(runs, given.cores)
    speed.rows.append(["**slime / TRL**", f"**{ratio.show(2)}**", *[""] * (len(speed.columns) - 2)])
    reach = reach_table(Judge(start, task), runs, start, raw)
    ways = min((runs[name] for name in runs if name.startswith("slime")), key=lambda several: several[0].median())
    overhead, cpu, share = overhead_tables(ways)
    raw["overhead"] = share
    goals = [Goal("slime / TRL in rollouts/s", ratio.median, GOAL)]
    write_result(given.out, [speed, reach, overhead, cpu], goals, facts, raw)


def trl_versions(python: Path) -> dict[str, str]:
    code = (
        "import json; from importlib.metadata import version; "
        "print(json.dumps({'TRL': version('trl'), 'its transformers': version('transformers')}))"
    )
    try:
        return json.loads(subprocess.check_output([str(python), "-c", code]))
    except OSError as error:
        raise ValueError(f"--trl-python {python}: {error}; `make bench-loop` makes TRL's environment") from error


if __name__ == "__main__":
    main()
