"""Judge a response's code by tests: asserts that call it, or runs of it with standard input and expected output.

- Used by: `--rm-type code`.
- Invariant: no process in which the response's code runs knows what a test expects, or can write the verdict. Expected
  output is compared here. Asserts run in a second sandbox, which calls the code through a channel (`asserting`).
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slime.core.code_tests import Assert, Streams
from slime.sandbox.asserting import TESTS
from slime.sandbox.run import Ended, Kind, Limits, Outcome, Running, SandboxFault, run

_LATER = 2
"""Seconds that the tests' sandbox may run longer than the code's, so that the code's limit is the one that counts."""


@dataclass(frozen=True)
class Judged:
    """The verdict on a response's code, and the reason if it is not right."""

    outcome: Outcome
    why: str = ""


def judge(code: str, tests: Sequence[Assert | Streams], *, kind: Kind, limits: Limits, seconds: float) -> Judged:
    """Return the verdict of all tests: the first that is not right, or right. `seconds`: for all of them together.

    Each run with standard input has its own `limits`; all asserts together have one set.

    Raises:
        SandboxFault: the sandbox has failed, so there is no verdict.
        ValueError: there are no tests.
    """
    if not tests:
        raise ValueError("there are no tests, so nothing is right or wrong")
    deadline = time.monotonic() + seconds
    asserts = [test for test in tests if isinstance(test, Assert)]
    for number, test in enumerate(tests, start=1):
        if isinstance(test, Assert) and test is not asserts[0]:
            continue  # judged with the first one
        left = int(deadline - time.monotonic())
        if left < 1:
            return Judged(Outcome.TIMEOUT, f"no time is left for test {number}")
        within = replace(limits, wall_seconds=min(limits.wall_seconds, left))
        if isinstance(test, Streams):
            judged = _judge_streams(code, test, kind, within)
            judged = replace(judged, why=f"test {number}: {judged.why}")
        else:
            judged = _judge_asserts(code, asserts, kind, within)
        if judged.outcome is not Outcome.RIGHT:
            return judged
    return Judged(Outcome.RIGHT)


def _judge_streams(code: str, test: Streams, kind: Kind, limits: Limits) -> Judged:
    ended = run(code, kind=kind, limits=limits, stdin=test.stdin)
    if ended.outcome is not None:
        return Judged(ended.outcome, _reason(ended))
    if plain_lines(ended.stdout.decode(errors="replace")) == plain_lines(test.stdout):
        return Judged(Outcome.RIGHT)
    return Judged(Outcome.WRONG, f"printed {ended.stdout[:200]!r}")


def plain_lines(text: str) -> list[str]:
    r"""Return the lines of an output without the spaces at their ends, and without empty lines at its end.

    >>> plain_lines("1 2 \r\n\n")
    ['1 2']
    """
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _judge_asserts(code: str, asserts: Sequence[Assert], kind: Kind, limits: Limits) -> Judged:
    ours, theirs = socket.socketpair()
    tests = json.dumps([{"source": test.source, "names": test.names} for test in asserts])
    longer = replace(limits, wall_seconds=limits.wall_seconds + _LATER, cpu_seconds=limits.cpu_seconds + _LATER)
    with ours, theirs:
        of_code = _helper("serving", {"solution.py": code}, kind, limits, theirs)
        of_tests = _helper("asserting", {TESTS: tests}, kind, longer, ours)
    # Nobody here holds the channel now, so each side sees when the other one ends.
    try:
        told = of_tests.wait()
    except SandboxFault:
        of_code.stop()
        of_code.wait()
        raise
    # If the code has ended before the tests, how it ended is the verdict. Otherwise it is of no use any more.
    if b'"gone"' not in told.stdout:
        of_code.stop()
    ended = of_code.wait()
    return _verdict(told, ended)


def _helper(name: str, files: dict[str, str], kind: Kind, limits: Limits, channel: socket.socket) -> Running:
    """Start one of the two programs; both import `wire`, so the sandbox gets the few files that they need."""
    folder = Path(__file__).parent
    package = {"slime/__init__.py": "", "slime/sandbox/__init__.py": ""}
    package |= {f"slime/sandbox/{each}.py": (folder / f"{each}.py").read_text() for each in (name, "wire")}
    program = f"import sys\nsys.path.insert(0, '.')\nfrom slime.sandbox.{name} import main\nmain()\n"
    return Running(program, kind=kind, limits=limits, files=files | package, channel=channel.fileno())


def _verdict(told: Ended, ended: Ended) -> Judged:
    """Combine what the tests' process has found and how the code's process ended."""
    if told.outcome is Outcome.TIMEOUT or told.outcome is Outcome.MEMORY:  # by the values that they were given
        return Judged(told.outcome, f"the tests: {_reason(told)}")
    if told.stopped == "output":  # a test printed what the code returned
        return Judged(Outcome.REFUSED, f"the tests: {_reason(told)}")
    try:
        found = json.loads(told.stdout)
    except ValueError as error:
        raise SandboxFault(f"the tests' process gave no result: {_reason(told)}") from error
    match found["outcome"]:
        case "fault":
            raise SandboxFault(found["why"])
        case "gone":
            return Judged(ended.outcome or Outcome.CRASH, _reason(ended))
        case outcome:
            return Judged(Outcome(outcome), found["why"])


def _reason(ended: Ended) -> str:
    """Return how a program ended, and the last line of its errors."""
    how = f"stopped: {ended.stopped}" if ended.stopped else f"ended with {ended.code}"
    last = ended.stderr.decode(errors="replace").rstrip().rpartition("\n")[2]
    return f"{how} {last}".rstrip()[:300]
