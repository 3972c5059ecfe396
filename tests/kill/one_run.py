"""Start a run of the system as separate processes, wait for it, and end every one of them.

- Used by: the kill sweep and the chaos run start train.py with this.
- Invariant: a process belongs to the run if the run's mark is in its environment, whatever its parent is now. No other
  process is ever ended, and each is ended by its id.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tests.cluster.runs import ROOT, as_in_a_terminal, environment, marked

RUN_LIMIT_S = 300.0
GONE_WITHIN_S = 30.0


class Run:
    """A run of `command` in `directory`, which gets one log for each start; all times are in seconds."""

    def __init__(
        self,
        directory: Path,
        command: Sequence[str],
        *,
        limit: float = RUN_LIMIT_S,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self._command, self._limit, self._variables = list(command), limit, dict(variables or {})
        self._mark = f"SLIME_TEST_{os.getpid()}_{directory.name.replace('-', '_')}"
        self._starts = 0
        self._over = False
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *extra: str) -> int:
        """Start the run, or start it again, with more arguments; return its process id.

        Raises:
            InterruptedError: another thread has ended it for good.
        """
        return self.start_with([*self._command, *extra])

    def start_with(self, command: Sequence[str]) -> int:
        """Start this command in the run's directory, as `start` does."""
        if self._over:
            raise InterruptedError("the sweep was ended")
        self._starts += 1
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / f"log-{self._starts}.txt").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**environment(), "OMP_NUM_THREADS": "1", **self._variables, self._mark: "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=as_in_a_terminal,
            )
        return self.process.pid

    @property
    def ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    @property
    def log(self) -> str:
        """Return the output of all starts."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.directory.glob("log-*.txt")))

    @property
    def last_line(self) -> str:
        lines = [line.strip() for line in self.log.splitlines() if line.strip() and not line.startswith("logs:")]
        return lines[-1][:300] if lines else "no output"

    def processes(self) -> list[psutil.Process]:
        return marked(self._mark)

    def wait(self) -> int:
        """Wait for the end, and return the exit code.

        Raises:
            TimeoutError: it still runs at its limit.
        """
        assert self.process is not None, "it was started"
        try:
            return self.process.wait(self._limit)
        except subprocess.TimeoutExpired:
            doing = "; ".join(sorted(map(title, self.processes())))
            raise TimeoutError(f"not done after {self._limit:.0f} s; its processes: {doing}") from None

    def left_over(self) -> list[str]:
        """Return the run's processes that are still there after its end and some time to clean up."""
        deadline = time.monotonic() + GONE_WITHIN_S
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return sorted(map(title, left))

    def end(self) -> None:
        """Kill all that is left of the run; it cannot be started again."""
        self._over = True
        for process in self.processes():
            kill(process)
        if self.process is not None:
            self.process.wait()


def title(process: psutil.Process) -> str:
    """Return the process's command, or the end of it if it is long."""
    try:
        return " ".join(process.cmdline())[-90:]
    except psutil.Error:
        return "(ended)"


def kill(process: psutil.Process, number: signal.Signals = signal.SIGKILL) -> bool:
    """Send a signal; return False if the process had ended. psutil compares start times, so it hits no other one."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True
