"""Run a Python program in the sandbox: `run` waits for its end, `Running` lets the caller do something meanwhile.

- Used by: `judging`, and everything else that executes what a model wrote.
- Invariant: a program cannot make `run` take longer than its limits (and a few seconds), return more than its output
  limit, or raise. SandboxFault means that the sandbox itself has failed, which says nothing about the program.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from slime.sandbox.inside import PROGRAM

Kind = Literal["namespaces", "rlimits"]
"""How a program is isolated. rlimits: weaker; for machines without namespaces."""
_ROOT = str(Path(__file__).parents[2])
_LAUNCH = f"import sys; sys.path.insert(0, {_ROOT!r}); from slime.sandbox.launcher import main; main()"
_GRACE = 10.0
"""Seconds beyond the limit of time in which a launcher has to start, and to end."""


class SandboxFault(Exception):
    """The sandbox could not run the program, or was disturbed while it ran."""


class Outcome(StrEnum):
    """How a program's run, or a judgement of it, ended."""

    RIGHT = "right"
    WRONG = "wrong"
    TIMEOUT = "timeout"
    """It used too much CPU time, or ran for too long."""
    MEMORY = "memory"
    CRASH = "crash"
    """It raised an exception, was killed by a signal, or ended early."""
    REFUSED = "refused"
    """It was killed for a system call that is not allowed, or for too much output."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of one run. Whole numbers, because the kernel counts in them."""

    wall_seconds: int = 8
    cpu_seconds: int = 5
    """The CPU time of all processes together."""
    memory_bytes: int = 512 << 20
    """The address space of each process, and the memory in use of all together."""
    processes: int = 32
    """Threads count."""
    open_files: int = 64
    """For each process."""
    output_bytes: int = 1 << 20
    """Standard output and errors together."""
    disk_bytes: int = 32 << 20
    """The size of the scratch directory."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a program ended."""

    code: int | None
    """The exit code, or minus the signal that killed it; None if the sandbox stopped it."""
    stopped: str | None
    """The limit for which it was stopped: wall, cpu, memory or output; "asked" by `Running.stop`."""
    stdout: bytes
    stderr: bytes
    peak_bytes: int = 0
    cpu_seconds: float = 0.0

    @property
    def outcome(self) -> Outcome | None:
        """The fault of the program; None if the program ran to its end and exited with 0."""
        if self.stopped in ("wall", "cpu"):
            return Outcome.TIMEOUT
        if self.stopped == "output" or self.code == -signal.SIGSYS:
            return Outcome.REFUSED
        if self.stopped == "memory" or (self.code and _last_line(self.stderr).startswith(b"MemoryError")):
            return Outcome.MEMORY
        return None if self.code == 0 else Outcome.CRASH


def _last_line(text: bytes) -> bytes:
    return text.rstrip().rpartition(b"\n")[2]


class Running:
    """A program that runs in a sandbox."""

    def __init__(
        self,
        program: str,
        *,
        kind: Kind,
        limits: Limits,
        stdin: str = "",
        files: Mapping[str, str] | None = None,
        channel: int | None = None,
    ) -> None:
        """Start it. `files` are put into its scratch directory; `channel` becomes its descriptor 3.

        Raises:
            ValueError: a file's path leads out of the directory.
        """
        files = {**(files or {}), PROGRAM: program}
        for name in files:
            if name.startswith("/") or ".." in name.split("/"):
                raise ValueError(f"{name!r} is not in the scratch directory")
        self._limits = limits
        python = os.path.realpath(vars(sys).get("_base_executable") or sys.executable)
        request = {
            "kind": kind, "limits": asdict(limits), "stdin": stdin, "files": files, "python": python,
            "python_directory": os.path.realpath(sys.base_prefix),
        }  # fmt: skip
        command = [python, "-P", "-s", "-S", "-E", "-c", _LAUNCH]
        kept = () if channel is None else (channel,)
        self._process = subprocess.Popen(
            [*command, *map(str, kept)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            pass_fds=kept, env={}, cwd="/",
        )  # fmt: skip
        assert self._process.stdin is not None, "it was opened with a pipe"
        with suppress(BrokenPipeError):  # it has ended, and `wait` reports why
            self._process.stdin.write(json.dumps(request).encode())
            self._process.stdin.close()
        self._process.stdin = None

    @property
    def pid(self) -> int:
        """The process number of the launcher."""
        return self._process.pid

    def stop(self) -> None:
        """End the program now; `wait` then returns an Ended that was stopped because it was asked to."""
        self._process.terminate()

    def wait(self) -> Ended:
        """Wait for the end.

        Raises:
            SandboxFault: the sandbox has failed.
        """
        try:
            out, errors = self._process.communicate(timeout=self._limits.wall_seconds + _GRACE)
        except subprocess.TimeoutExpired as error:
            self._process.kill()
            self._process.communicate()
            raise SandboxFault("the launcher did not end") from error
        if self._process.returncode == -signal.SIGTERM:  # asked to stop before it had begun
            return Ended(code=None, stopped="asked", stdout=b"", stderr=b"")
        line, _, rest = out.partition(b"\n")
        try:
            report: dict[str, Any] = json.loads(line)
        except ValueError as error:
            why = errors.decode(errors="replace").strip()[-500:]
            raise SandboxFault(f"the launcher ended with {self._process.returncode}: {why}") from error
        if "fault" in report:
            raise SandboxFault(report["fault"])
        cut = report["output_bytes"]
        return Ended(
            code=report["code"], stopped=report["stopped"], stdout=rest[:cut], stderr=rest[cut:],
            peak_bytes=report.get("peak_bytes", 0), cpu_seconds=report.get("cpu_seconds", 0.0),
        )  # fmt: skip


def run(
    program: str,
    *,
    kind: Kind = "namespaces",
    limits: Limits | None = None,
    stdin: str = "",
    files: Mapping[str, str] | None = None,
) -> Ended:
    """Run a program to its end.

    >>> run("print(6 * 7)").stdout
    b'42\\n'

    Raises:
        SandboxFault: the sandbox has failed.
    """
    return Running(program, kind=kind, limits=limits or Limits(), stdin=stdin, files=files).wait()


def refusal(kind: Kind) -> str | None:
    """Run a small program; return why programs cannot be run on this machine, or None if they can."""
    program = "import subprocess, sys, os\npid = os.fork()\nif pid == 0: os._exit(0)\nos.waitpid(pid, 0)\nprint('ok')"
    try:
        ended = run(program, kind=kind)
    except (SandboxFault, OSError) as error:
        return str(error)
    if ended.code == 0 and ended.stdout == b"ok\n":
        return None
    return (
        f"a program that only starts a process ended with {ended.code}: {ended.stderr.decode(errors='replace')[-300:]}"
    )
