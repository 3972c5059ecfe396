"""Memory of a run's processes over hundreds of rollouts: what grows, and by how much a rollout.

    python -m bench.memory            (make bench-memory)

A whole run of the demo's model with tiny rollouts, and with evaluations and checkpoints on the way. After every rollout
the private memory (USS) of each process is read: pages that no other process shares, so a page of Ray's object store
counts for nobody. The first rollouts are left out, because allocators and caches fill then. A leak is a line that
rises: growth is the median slope over all pairs of rollouts (Theil and Sen), which single checkpoints do not change.

Invariant: the run is a plain one; nothing in it knows that it is measured.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

from bench.common import OUTPUTS, ROOT, Goal, Table, machine, write_result
from bench.loop import ROLES, follow

MEASURED = ("driver", "rollout manager", "trainer", "engine", "reward workers")
GOAL_KIB = 40.0
"""KiB a rollout of the process that grows most: 40 MB in a thousand rollouts."""
MIB = 2**20


def private_memory(root: psutil.Process) -> dict[str, int]:
    """Return the private bytes of the processes under `root`, the sum for each role in `MEASURED`."""
    found: dict[str, int] = {}
    for process in (root, *root.children(recursive=True)):
        try:
            line = " ".join(process.cmdline())
            role = next((role for mark, role in ROLES.items() if mark in line), "other")
            if role in MEASURED and "process_guard" not in line:
                found[role] = found.get(role, 0) + process.memory_full_info().uss
        except psutil.Error:
            continue  # it has ended in the meantime
    return found


def slope(values: Sequence[float]) -> float:
    """Return the median of the slopes between all pairs of values, each a rollout apart from the next.

    >>> slope([5.0, 5.5, 99.0, 6.5, 7.0])  # half a unit a rollout, whatever happened in between
    0.5
    """
    values_N = np.asarray(values, dtype=np.float64)
    first, second = np.triu_indices(len(values_N), 1)
    return float(np.median((values_N[second] - values_N[first]) / (second - first)))


def make_task(directory: Path) -> Path:
    """Make the demo's problems and its model with random weights."""
    make = [sys.executable, "examples/arithmetic/make_task.py", "--out", str(directory), "--seed", "1"]
    subprocess.run(make, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    return directory


def run(task: Path, out: Path, *, rollouts: int, every: int, more: Sequence[str] = ()) -> list[dict[str, int]]:
    """Run that many rollouts; return the private bytes by role after each.

    Args:
        every: rollouts between two evaluations, and between two checkpoints.
        more: further flags.

    Raises:
        RuntimeError: the run failed.
    """
    command = ["bash", "scripts/run-glm4-tiny-cpu.sh", "--actor-num-gpus-per-node", "1", "--rollout-num-gpus", "1"]
    command += ["--cpu-threads-per-process", "1", "--rollout-batch-size", "4", "--n-samples-per-prompt", "2"]
    command += ["--rollout-max-response-len", "12", "--num-rollout", str(rollouts), "--save-interval", str(every)]
    command += ["--eval-interval", str(every), "--keep-last-checkpoints", "1", "--skip-eval-before-train", *more]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    model = str(task / "model")
    places = {"TASK_DIR": str(task), "HF_DIR": model, "REF_DIR": model, "SAVE_DIR": str(out / "run")}
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "SEED": "1", **places}
    out.mkdir(parents=True)
    found: list[dict[str, int]] = []
    with (out / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            for record in follow(out / "run" / "metrics.jsonl", process):
                if "time/step" in record:
                    found += [private_memory(psutil.Process(process.pid))]
        finally:
            if process.poll() is None:
                process.terminate()
            code = process.wait()
    if code != 0 or len(found) != rollouts:
        raise RuntimeError(f"the run ended with code {code} after {len(found)} rollouts; see {out / 'log'}")
    return found[:-1]  # the last is read while processes end


def growth_table(found: Sequence[dict[str, int]], warmup: int) -> tuple[Table, float]:
    """Return each role's memory and growth after the warm-up, and the largest growth in KiB a rollout."""
    counted = found[warmup:]
    table = Table(
        f"Private memory over {len(found) + 1} rollouts",
        ["processes", f"after {warmup}, MiB", "at the end, MiB", "KiB a rollout"],
        note=f"Growth is the median slope after the first {warmup} rollouts.",
    )
    largest = 0.0
    for role in MEASURED:
        values = [record[role] for record in counted]
        growth = slope(values) / 1024
        largest = max(largest, growth)
        table.rows.append([role, f"{values[0] / MIB:.1f}", f"{values[-1] / MIB:.1f}", f"{growth:.1f}"])
    return table, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=60, help="rollouts that do not count")
    parser.add_argument("--every", type=int, default=25, help="rollouts between checkpoints and between evaluations")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "memory.json")
    given, more = parser.parse_known_args()
    facts = machine()
    out = given.out.with_suffix("")
    shutil.rmtree(out, ignore_errors=True)
    task = make_task(out / "task")
    found = run(task, out / "whole", rollouts=given.rollouts, every=given.every, more=more)
    table, largest = growth_table(found, given.warmup)
    goal = Goal(f"{GOAL_KIB:g} KiB a rollout / the largest growth", GOAL_KIB / max(largest, 1e-3), 1.0)
    write_result(given.out, [table], [goal], facts, {"bytes": found})


if __name__ == "__main__":
    main()
