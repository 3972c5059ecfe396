"""Embedded engines for tests, which start without the seconds that importing torch takes.

A process that has imported the server is forked for each engine, and the fork runs what
`python -m slime.engine.embedded.server FLAGS...` runs. Whether that command starts is for other tests, such as
engine/test_launch.py.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

from slime.engine.server_process import find_free_port, is_healthy

SERVER = "slime.engine.embedded.server"
PR_SET_PDEATHSIG = 1
GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""


def _serve(flags: list[str], log_path: str, prepare: Callable[[], None] | None) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with the process that it is forked from
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    from slime.engine.embedded.server import main

    if prepare is not None:
        prepare()
    sys.exit(main(flags))


class ForkedEngine:
    """An engine process, with what tests use of a ManagedProcess. It calls `prepare` before it serves."""

    def __init__(self, model: Path, *flags: str, log_path: Path, prepare: Callable[[], None] | None = None) -> None:
        port = find_free_port()
        self.url, self.log_path = f"http://127.0.0.1:{port}", log_path
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([SERVER])
        words = ["--model-path", str(model), "--port", str(port), *flags]
        self._process = context.Process(target=_serve, args=(words, str(log_path), prepare), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def alive(self) -> bool:
        return self._process.is_alive()

    def wait_ready(self, timeout: float) -> None:
        """Wait until /health answers 200.

        Raises:
            RuntimeError: the process ended, or was not ready within `timeout` seconds; the error has its log.
        """
        deadline = monotonic() + timeout
        while not is_healthy(self.url):
            if not self.alive() or monotonic() > deadline:
                raise RuntimeError(f"exit code {self._process.exitcode}: {self.log_path.read_text()}")
            sleep(0.05)

    def stop(self) -> None:
        """End the process: SIGTERM, then SIGKILL."""
        self._process.terminate()
        self._process.join(GRACE)
        if self.alive():
            self._process.kill()
            self._process.join()
