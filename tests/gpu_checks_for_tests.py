"""Checks that need no GPU, for tests/test_gpu_runner.py."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from tests.gpu.checks import Report, check


@check(gpus=0, minutes=1)
def passes(report: Report) -> None:
    """Report two rows."""
    report.row("difference", 0.0, limit="= 0", ok=True)
    report.row("speed", 123456.0)


@check(gpus=0, minutes=1)
def misses(report: Report) -> None:
    report.row("difference", 0.5, limit=0.1, ok=False)


@check(gpus=0, minutes=1)
def raises(report: Report) -> None:
    report.row("before", 1)
    raise RuntimeError("the reason")


@check(gpus=0, minutes=1)
def crashes(report: Report) -> None:
    os.abort()


@check(gpus=0, minutes=0.08)
def hangs(report: Report) -> None:
    """Hang, with a child that leaves the process group as servers do, and that must not outlive the check."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    report.row("child", child.pid)
    time.sleep(600)


@check(gpus=0, minutes=1)
def says_why_not(report: Report) -> None:
    report.skip("no such library")


@check(gpus=99, minutes=1)
def needs_many(report: Report) -> None:
    raise AssertionError("never run")


@check(gpus=0, minutes=1000)
def takes_long(report: Report) -> None:
    """Run for longer than the first test allows; the second test ends the runner in the middle of it."""
    time.sleep(600)
