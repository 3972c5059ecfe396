"""Shared parts of the benchmarks: alternating turns, medians with their spread, CPU time of processes, results.

- Used by: `engine`, `trainer` and `loop`, which write `outputs/bench/<name>.json`; `report` puts their tables into
  docs/PERFORMANCE.md.
- Invariant: what is compared was measured in one run, in alternation, so that a machine that slows down in the meantime
  slows both sides equally.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
OUTPUTS = ROOT / "outputs" / "bench"
PACKAGES = ("torch", "transformers", "megatron-core", "sglang-router", "ray", "aiohttp", "numpy")


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and their range."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        numbers = list(values)
        return cls(statistics.median(numbers), min(numbers), max(numbers), len(numbers))

    def show(self, digits: int = 0, unit: str = "") -> str:
        return f"{self.median:,.{digits}f}{unit} ({self.low:,.{digits}f}–{self.high:,.{digits}f})"


@dataclass
class Table:
    """One table of the report. The first column is text, the others are numbers as they should be printed."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list[Sequence[str]])
    note: str = ""

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", *([self.note, ""] if self.note else [])]
        lines.append("| " + " | ".join(self.columns) + " |")
        lines.append("|" + "|".join([" --- ", *([" ---: "] * (len(self.columns) - 1))]) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines)


@dataclass(frozen=True)
class Goal:
    """A ratio with its goal."""

    what: str
    ratio: float
    goal: float

    @property
    def met(self) -> bool:
        return self.ratio >= self.goal


def in_turns(sides: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Return each side's figures, measured A B C A B C …; the first `warmup` turns of each side are discarded."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name, measure in sides.items():
            value = measure()
            if turn >= warmup:
                found[name].append(value)
    return found


def ratios(ours: Sequence[float], peer: Sequence[float]) -> Spread:
    """Return ours / peer for each turn: both sides of a turn ran on the machine in the same state."""
    return Spread.of(a / b for a, b in zip(ours, peer, strict=True))


def tree_cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its children."""
    process = psutil.Process(pid)
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def thread_cpu_seconds(pid: int) -> dict[int, float]:
    """Return the CPU time of each thread of a process, in nanosecond resolution if the kernel has it (Linux)."""
    found: dict[int, float] = {}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        found[int(thread.name)] = int((thread / "schedstat").read_text().split()[0]) * 1e-9
    return found


class Busy:
    """Measures the CPU seconds that named processes use while the block runs."""

    def __init__(self, **pids: int) -> None:
        self._pids = pids
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> Busy:
        self._wall = time.perf_counter()
        self._before = {name: tree_cpu_seconds(pid) for name, pid in self._pids.items()}
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = {name: tree_cpu_seconds(pid) - self._before[name] for name, pid in self._pids.items()}
        self.wall = time.perf_counter() - self._wall


def machine() -> dict[str, str]:
    """Return the kind of machine and the versions, for the report."""
    facts = {"machine": f"{os.cpu_count()} CPU cores", "python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    load = os.getloadavg()[0]
    return facts | {"load before": f"{load:.2f}"}


def write_result(
    path: Path, tables: Sequence[Table], goals: Sequence[Goal], facts: Mapping[str, str], raw: Mapping[str, Any]
) -> None:
    """Write the result as JSON, and print its tables."""
    name = path.stem
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "name": name,
        "command": f"make bench-{name}",
        "argv": sys.argv[1:],
        "facts": dict(facts),
        "tables": [asdict(table) for table in tables],
        "goals": [asdict(goal) for goal in goals],
        "raw": dict(raw),
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    for table in tables:
        print(f"\n{table.markdown()}")
    for goal in goals:
        print(f"\n{goal.what}: {goal.ratio:.2f} (goal {goal.goal:g}): {'met' if goal.met else 'MISSED'}")
    print(f"\n-> {path}", flush=True)
