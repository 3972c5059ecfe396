"""Whole runs of train.py for the checks: their command lines, their processes, and the numbers that they leave."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.gpu.checks import Report

ROOT = Path(__file__).resolve().parents[2]
TAIL_LINES = 25
PLAIN_ENGINE = (
    *("--rollout-engine", "sglang", "--sglang-attention-backend", "triton"),
    *("--sglang-sampling-backend", "pytorch", "--sglang-grammar-backend", "none"),
)
"""Flags of SGLang that avoid kernels which a machine may lack, so that every check runs wherever SGLang does."""
WORDS_OF = 'python3() { printf "%s\\0" "$@"; }; exec() { "$@"; }; source "$1"'


def words_of(script: str, variables: Mapping[str, str]) -> list[str]:
    """Return the flags with which scripts/SCRIPT would start train.py."""
    command = ["bash", "-euc", WORDS_OF.replace("$1", str(ROOT / "scripts" / script))]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[1:-1]


def without(words: Sequence[str], *flags: str) -> list[str]:
    """Return `words` without these flags and the one value of each."""
    kept: list[str] = []
    position = 0
    while position < len(words):
        if words[position] in flags:
            position += 2
        else:
            kept.append(words[position])
            position += 1
    return kept


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a temporary directory for files that are too large to keep."""
    path = Path(tempfile.mkdtemp(prefix="slime-gpu-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def kept_directory(report: Report, name: str) -> Path:
    """Return an empty directory next to the check's log, for a run's logs and metrics."""
    path = report.path.parent / f"{report.name}-{name}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def run(command: Sequence[str], *, logs: Path | None = None) -> None:
    """Run a Python program of this tree; its output goes into the check's log.

    Raises:
        RuntimeError: it failed; the ends of its processes' logs are printed first.
    """
    print(f"$ python {' '.join(command)}", flush=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=False)
    if done.returncode == 0:
        return
    for log in sorted(logs.rglob("*.log")) if logs is not None else []:
        print(f"--- the end of {log}")
        print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]), flush=True)
    raise RuntimeError(f"{command[0]} ended with exit code {done.returncode}")


def train(words: Sequence[str], log_dir: Path) -> list[dict[str, Any]]:
    """Run train.py, and return the events of its metrics.jsonl."""
    unsaved = () if "--save" in words else ("--save-interval", "0")
    run(["train.py", *words, *unsaved, "--log-dir", str(log_dir)], logs=log_dir)
    return [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]


def series(events: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Return a metric's values over the steps that have it."""
    return [float(event[name]) for event in events if name in event]
