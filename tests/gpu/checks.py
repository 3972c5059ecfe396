"""A GPU check is a function with `@check(gpus=1, minutes=5)` that takes a Report and adds rows to it.

    @check(gpus=2, minutes=3)
    def broadcast(report: Report) -> None:
        '''Every bucket arrives.'''
        report.row("largest difference", 0.0, limit="= 0", ok=True)   # passed or failed
        report.row("speed", "212 GB/s", limit="230 GB/s, a plain broadcast")   # a figure: ok is None

An exception becomes a failed row with the end of its traceback, and the rows before it stay. The runner
(tests/gpu/runner.py) gives each check its own process group, time limit and log.

Invariant: a row is on disk when `row` returns, so a check that is killed has still reported what it found.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

MODULES = (
    "parity",
    "attention",
    "fused",
    "experts",
    "trainer_speed",
    "trainer",
    "checkpoint",
    "engine",
    "sync",
    "colocate",
    "learn",
    "rollout_speed",
    "layouts",
    "pipeline",
    "scripts",
)
"""The modules of tests/gpu in the order in which they run; a name with a dot is a module elsewhere."""

Function = TypeVar("Function", bound=Callable[..., None])
Value = str | int | float | bool
OK, FAILED, FIGURE, SKIPPED, MISSING, NOT_RUN = "ok", "FAILED", "figure", "skipped", "missing", "not run"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    check: str
    what: str
    value: str
    limit: str = ""
    state: str = FIGURE
    seconds: float = 0.0
    """Seconds since the check began."""


@dataclass(frozen=True)
class Needs:
    """The needs of a check, from its decorator."""

    gpus: int
    minutes: float


class SkipCheck(Exception):
    """The check cannot find out anything on this machine; the text gives the reason."""


def check(*, gpus: int = 1, minutes: float = 5) -> Callable[[Function], Function]:
    """Mark a function of a Report as a check that needs `gpus` GPUs and takes at most `minutes`."""

    def mark(function: Function) -> Function:
        cast(Any, function).needs = Needs(gpus, minutes)
        return function

    return mark


class Report:
    """The rows of one check; each is appended at once to a file that all checks share."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self.failed = False
        self._start = time.monotonic()

    def row(self, what: str, value: Value, limit: Value | None = None, ok: bool | None = None) -> None:
        """Add a row: passed or failed by `ok`, or a figure without a limit if it is None."""
        state = FIGURE if ok is None else OK if bool(ok) else FAILED
        self._write(what, value, limit, state)

    def skip(self, why: str) -> None:
        """End the check, because it cannot find out anything on this machine."""
        raise SkipCheck(why)

    def skipped(self, why: str) -> None:
        self._write(why, "", None, SKIPPED)

    def fail(self, what: str, value: Value) -> None:
        """Add a failed row."""
        self._write(what, value, None, FAILED)

    def _write(self, what: str, value: Value, limit: Value | None, state: str) -> None:
        self.failed |= state == FAILED
        row = Row(
            check=self.name,
            what=what,
            value=shown(value),
            limit="" if limit is None else shown(limit),
            state=state,
            seconds=round(time.monotonic() - self._start, 1),
        )
        append(self.path, row)
        print(f"[{row.seconds:7.1f} s] {row.state}: {row.what}: {row.value}  ({row.limit})", flush=True)


def shown(value: Value) -> str:
    """Return numbers with four digits, and everything else as it is."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return str(value)


def append(path: Path, row: Row) -> None:
    """Append one line of JSON in one write, because several processes append to the file."""
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(asdict(row)).encode() + b"\n")
        os.fsync(file.fileno())
