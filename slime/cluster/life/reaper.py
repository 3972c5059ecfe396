"""Reaper: ends all processes of a run and removes its temporary files once its driver is gone, also after SIGKILL.

- Where it sits: `ray_session` starts one before it starts Ray. Most of Ray notices by itself that a driver died.
  Its agents first try for up to a minute to report to a control store that has died as well, and stopped processes
  (SIGSTOP) notice nothing.
- Invariant: only processes with the run's own mark are ended, and only its own directories are removed. A Ray that the
  run joined (RAY_ADDRESS) has neither.

    python -m slime.cluster.life.reaper MARK DIRECTORY LOGS

Its standard input is a pipe from the driver, which ends when the driver does. The driver writes these lines into it:

    session DIR     the directory in which the run's own Ray keeps its files
    well            nothing has failed: no logs of Ray are kept
    alive           the driver lives on after the run: its own children are spared

A driver that was killed writes no line. Its parent process id does not tell: the pipe of a dying process is closed
before its children are handed to another parent.
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
from io import FileIO
from pathlib import Path
from types import TracebackType

import psutil

from slime.cluster.life.run_files import RunFiles, remove_session
from slime.core.marks import marked
from slime.core.process_guard import GUARD

GUARDS_WITHIN_S = 8.0
"""Seconds in which guards may end their commands, before they are killed as well."""
GONE_WITHIN_S = 10.0
KEPT_LOGS = ("raylet.*", "gcs_server.*", "worker-*")
"""Logs of Ray that show why a process died."""


class Reaper:
    """The driver's side of the reaper."""

    def __init__(self, mark: str, files: RunFiles, logs: Path) -> None:
        reading, writing = os.pipe()
        self._pipe = FileIO(writing, "w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "slime.cluster.life.reaper", mark, str(files.path), str(logs)],
            stdin=reading,
            start_new_session=True,
            pass_fds=(files.lock,),
        )
        os.close(reading)

    def tell(self, line: str) -> None:
        with suppress(BrokenPipeError):  # the reaper was killed
            self._pipe.write(f"{line}\n".encode())

    def leave(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Tell the reaper that the run has ended, and whether it ended without an error; wait for the reaper."""
        if kind is None:
            self.tell("well")
        self.tell("alive")
        self.finish()

    def finish(self) -> None:
        """Close the pipe, so that the reaper acts, and wait until it has finished."""
        self._pipe.close()
        try:
            self._process.wait(2 * (GUARDS_WITHIN_S + GONE_WITHIN_S))
        except subprocess.TimeoutExpired:
            self._process.kill()


def end_marked(mark: str, *, spare: Iterable[int]) -> None:
    """End the processes with `mark`, except this one and those to spare. Guards end their own commands first."""
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
    """Return the guards among these processes, and the processes that run under them."""
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
    """Copy the logs of Ray's processes and workers, before they are removed with the session."""
    target = logs / "ray" / session.name
    for log in (log for pattern in KEPT_LOGS for log in (session / "logs").glob(pattern)):
        with suppress(OSError):  # keep as many logs as possible
            if log.stat().st_size:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(log, target / log.name)


def main() -> None:
    mark, directory, logs = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    driver = os.getppid()
    session: str | None = None
    well = alive = False
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        session = rest if word == "session" else session
        well, alive = well or word == "well", alive or word == "alive"
    spare: set[int] = {driver}
    if alive:
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
