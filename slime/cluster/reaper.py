"""Ends what a run has started, and removes its temporary files, once its driver is gone, also by SIGKILL.

Path: `Processes.start` starts one before it starts Ray. Most of Ray notices by itself that a driver died; its agents
first try to report to a control store that has died as well, for up to a minute, and what is stopped (SIGSTOP) notices
nothing. Invariant: only processes with the run's own mark are ended, and only its own directories are removed. A Ray
that runs already (RAY_ADDRESS) has neither.

    python -m slime.cluster.reaper MARK DIRECTORY LOGS

Its standard input is a pipe of the driver's, and ends when the driver does. Lines that come through it:

    session DIR     the run's own Ray keeps its files there
    well            nothing has failed: no logs of Ray are kept
    all             the driver is alive and gives up: its own children end as well
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from slime.cluster.run_files import RunFiles, remove_session
from slime.core.guard import GUARD
from slime.core.marks import marked

GUARDS_WITHIN_S = 8.0
"""Seconds for guards to end their commands, before they are killed as well."""
GONE_WITHIN_S = 10.0
KEPT_LOGS = ("raylet.*", "gcs_server.*", "worker-*")
"""Logs of Ray that say why a process died."""


class Reaper:
    """The driver's side."""

    def __init__(self, mark: str, files: RunFiles, logs: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "slime.cluster.reaper", mark, str(files.path), str(logs)],
            stdin=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            pass_fds=(files.lock,),
        )

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None, "it was opened with a pipe"
        with suppress(BrokenPipeError):  # it was killed
            self._process.stdin.write(f"{line}\n".encode())

    def finish(self) -> None:
        """Let it act, and wait until it has."""
        assert self._process.stdin is not None, "it was opened with a pipe"
        self._process.stdin.close()
        try:
            self._process.wait(2 * (GUARDS_WITHIN_S + GONE_WITHIN_S))
        except subprocess.TimeoutExpired:
            self._process.kill()


def end_marked(mark: str, *, spare: Iterable[int]) -> None:
    """End the processes with `mark`, but this one and those to spare. Guards end their own commands first."""
    spared = {os.getpid(), *spare}

    def left() -> set[int]:
        return set(marked(mark)) - spared

    guarded = _guarded(left())
    _kill(left() - guarded)
    deadline = time.monotonic() + GUARDS_WITHIN_S
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
        _kill(left() - guarded)
    deadline = time.monotonic() + GONE_WITHIN_S
    while (rest := left()) and time.monotonic() < deadline:
        _kill(rest)
        time.sleep(0.1)


def _guarded(pids: Iterable[int]) -> set[int]:
    """The guards among these processes, and what runs under them."""
    found: set[int] = set()
    for pid in pids:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            if GUARD[-1] in process.cmdline():
                found |= {pid, *(child.pid for child in process.children(recursive=True))}
    return found


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _keep_logs(session: Path, logs: Path) -> None:
    """Copy what Ray's processes and its workers have written, before it goes with the session."""
    target = logs / "ray" / session.name
    for log in (log for pattern in KEPT_LOGS for log in (session / "logs").glob(pattern)):
        with suppress(OSError):  # what can be kept is kept
            if log.stat().st_size:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(log, target / log.name)


def main() -> None:
    mark, directory, logs = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    driver = os.getppid()
    session: str | None = None
    well = everything = False
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        session = rest if word == "session" else session
        well, everything = well or word == "well", everything or word == "all"
    spare: set[int] = {driver}
    if os.getppid() == driver and not everything:
        with suppress(psutil.Error):  # it has just ended
            spare |= {child.pid for child in psutil.Process(driver).children(recursive=True)}
    end_marked(mark, spare=spare)
    if session is not None:
        if not well:
            _keep_logs(Path(session), logs)
        remove_session(session)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
