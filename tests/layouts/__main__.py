"""`python -m tests.layouts --draws 300 --seed 0`: loss and gradients do not depend on how the work is cut.

Each draw is a model, an algorithm, samples and a layout of up to 8 processes. One step of it is compared with the same
step in one process (see `one_step`). A draw that fails is named by its seed: `--only SEED` runs it again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: many ranks share few cores

from tests.layouts.bugs import BUGS
from tests.layouts.draws import PROCESSES, draw
from tests.layouts.one_step import TIMEOUT, ready, run_pair
from tests.worker_pool import WorkerPool

SEEDS_APART = 1_000_000
PROGRESS_SECONDS = 30.0
Errors = dict[str, float]


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m tests.layouts", description="One step, cut and in one process.")
    flags.add_argument("--draws", type=int, default=300)
    flags.add_argument("--seed", type=int, default=0, help="of the draws; another one makes others")
    flags.add_argument(
        "--only", type=int, nargs="+", metavar="SEED", help="these draws, by the seeds that were printed"
    )
    flags.add_argument("--bug", choices=sorted(BUGS), help="run the cut side of every draw with this bug")
    return flags


def main(argv: Sequence[str]) -> int:
    """Run the draws; return 0 if none failed."""
    options = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    first = options.seed * SEEDS_APART
    seeds: Sequence[int] = options.only or range(first, first + options.draws)
    report = Report(len(seeds))
    workers = WorkerPool()
    try:
        workers.run(max(PROCESSES), ready, timeout=TIMEOUT)
        with tempfile.TemporaryDirectory() as folder:
            for seed in seeds:
                report.add(seed, workers, Path(folder), options.bug)
    finally:
        workers.close()
        report.print()
    return int(bool(report.failed))


class Report:
    """The results of the draws so far."""

    def __init__(self, num_draws: int) -> None:
        self.num_draws = num_draws
        self.begin = self.reported = time.monotonic()
        self.failed: list[int] = []
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.again: Counter[str] = Counter()
        self.refused: dict[str, int] = {}
        self.worst: dict[str, tuple[float, int]] = {}
        self.done = 0

    def add(self, seed: int, workers: WorkerPool, root: Path, bug: str | None) -> None:
        """Make one draw, run it, and compare."""
        drawn = draw(seed, root, self.refused)
        try:
            pair = run_pair(workers, drawn, root, bug)
            errors, why = pair.errors(), ""
            self.again.update(pair.near)
        except (AssertionError, TimeoutError) as error:  # raised by a rank, with its traceback
            errors, why = {}, str(error)
        self.done += 1
        for name, error in errors.items():
            self.worst[name] = max(self.worst.get(name, (0.0, seed)), (error, seed))
        for dimension, value in drawn.dimensions().items():
            self.counts[dimension][value] += 1
        if why or not all(error <= 1 for error in errors.values()):
            self.failed.append(seed)
            print(f"FAILED {drawn}\n  {why or described(errors)}", flush=True)
        if time.monotonic() - self.reported > PROGRESS_SECONDS:
            self.reported = time.monotonic()
            print(f"{self.done} of {self.num_draws}, {len(self.failed)} failed, {self.seconds:.0f} s", flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def print(self) -> None:
        """Print counts by dimension, the worst errors, and the verdict."""
        width = max(map(len, [*self.counts, ""])) + 2
        for dimension, counts in self.counts.items():
            values = ", ".join(f"{value} {count}" for value, count in sorted(counts.items()))
            print(f"{dimension:<{width}}{values}")
        print("\nworst errors, in units of what is allowed:")
        for name, (error, seed) in self.worst.items():
            print(f"  {name:<22}{error:8.3f}  draw {seed}")
        _print_counts("samples drawn again, for the first ones came near to", self.again)
        _print_counts("draws made again, for the rules refuse", self.refused)
        failed = f": {' '.join(map(str, self.failed))}" if self.failed else ""
        print(f"\n{self.done} draws, {len(self.failed)} failed{failed}; {self.seconds / 60:.1f} min", flush=True)


def _print_counts(title: str, counts: Mapping[str, int]) -> None:
    if counts:
        print(f"\n{title}:")
    for name, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"  {count:6d}  {name}")


def described(errors: Errors) -> str:
    return ", ".join(f"{name} {error:.3g}" for name, error in errors.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
