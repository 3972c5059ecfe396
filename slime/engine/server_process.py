"""A server as a process: it starts at a free port, is ready when it answers, and cannot outlive its owner.

- Used by: `launch` makes one for each engine and for the router. `ask` and `is_healthy` are for code without an event
  loop.
- Invariant: every process is started by the guard (`core.process_guard`), which ends it when this process is gone,
  killed or not. A server counts as ready only if it holds its port itself.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from slime.core.process_guard import GUARD
from slime.engine.connection import authorization
from slime.engine.protocol import Endpoint, RouterEndpoint

LOG_TAIL = 30
"""The number of log lines in an error."""
STOP_TIMEOUT = 10.0
PORT_TRIES = 5
"""The number of ports to try, if other processes take each one before the server does."""
PORT_TAKEN = re.compile("address already in use", re.IGNORECASE)


def find_free_port(host: str = "127.0.0.1") -> int:
    """Return a port that is free now."""
    with socket.create_server((host, 0)) as listener:
        return listener.getsockname()[1]


def start_at_free_port(
    launch: Callable[[int], ManagedProcess],
    *,
    port: Callable[[], int],
    timeout: float,
    keep: Callable[[ManagedProcess], None],
) -> ManagedProcess:
    """Start a server at a free port, and return it once it is ready.

    A server binds its port seconds after the port was found free, and another process of this machine may be faster.
    Then the server ends, and is started at another port.

    Args:
        launch: starts the server at a port.
        port: returns a port that is free now.
        timeout: seconds in which the server has to be ready.
        keep: is given each process as soon as it is started, so that its owner can stop it.

    Raises:
        RuntimeError: the server ended for another reason, is not ready in time, or lost its port PORT_TRIES times.
    """
    tries = 0
    while True:
        tries += 1
        keep(process := launch(port()))
        try:
            process.wait_ready(timeout)
            return process
        except RuntimeError:
            if tries == PORT_TRIES or not process.lost_its_port():
                raise
            process.stop()


class ManagedProcess:
    """A process under the guard. `name` is what errors call it ('engine 0', 'router')."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        url: str,
        log_path: str | Path,
        environment: Mapping[str, str] | None = None,
        phases: Sequence[tuple[str, str]] = (),
        directory: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        """`phases` maps texts in the process's log to what it does after them. `directory` belongs to the process, and
        is removed with it."""
        self.name, self.url, self.log_path = name, url, Path(log_path)
        self._phases, self._directory = phases, directory
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        # The log file of an earlier run may exist; its contents do not describe this run.
        self._log_start = self.log_path.stat().st_size if self.log_path.is_file() else 0
        own = [] if directory is None else [f"directory={directory.name}"]
        self._guard = subprocess.Popen(
            [*GUARD, str(self.log_path), *own, "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # a Ctrl-C in the terminal reaches only this process, which decides what ends when
        )
        assert self._guard.stdout is not None
        with self._guard.stdout as pipe:
            line = pipe.readline()
        if not line:
            raise RuntimeError(f"{name}: the guard process did not start (exit code {self._guard.wait()})")
        self.pid = int(line)
        """The process id of the command itself."""

    def alive(self) -> bool:
        return self._guard.poll() is None

    def phase(self) -> str:
        """Return the phase of the process's start, as far as its log shows it."""
        return phase_of(self._log(), self._phases)

    def _log(self) -> str:
        if not self.log_path.is_file():
            return ""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def wait_ready(self, timeout: float) -> None:
        """Wait until /health answers 200, and it is this process that answers.

        Raises:
            RuntimeError: the process ended, or was not ready within `timeout` seconds; the error has what it was doing,
                and the end of its log.
        """
        deadline = time.monotonic() + timeout
        while not (is_healthy(self.url) and self._listens()):
            if not self.alive():
                raise RuntimeError(
                    f"{self.name} ended while {self.phase()} (exit code {self._guard.poll()}){self.log_tail()}"
                )
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self.name} was not ready at {self.url} within {timeout:g} s, it was {self.phase()} "
                    f"(--engine-start-timeout gives it longer){self.log_tail()}"
                )
            time.sleep(0.05)

    def _listens(self) -> bool:
        """Return whether the port is this process's: another one may have taken it first, and be healthy."""
        try:
            own = psutil.Process(self.pid)
            sockets = [socket for one in (own, *own.children(recursive=True)) for socket in one.net_connections("tcp")]
        except psutil.NoSuchProcess:
            return False
        port = urlsplit(self.url).port
        return any(socket.status == psutil.CONN_LISTEN and socket.laddr.port == port for socket in sockets)

    def lost_its_port(self) -> bool:
        """Return whether the process has ended because another one has its port."""
        return not self.alive() and PORT_TAKEN.search(self._log()) is not None

    def log_tail(self) -> str:
        """Return the end of the process's log, for an error."""
        if not self.log_path.is_file():
            return f"; there is no log at {self.log_path}"
        lines = self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL:]
        return f"; the end of {self.log_path}:\n" + "\n".join(f"  | {line}" for line in lines)

    def stop(self) -> None:
        """End the process: SIGTERM, then SIGKILL after the guard's grace period."""
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        try:
            self._guard.wait(timeout=STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._guard.kill()  # the command dies with it
            self._guard.wait()
        if self._directory is not None:
            self._directory.cleanup()


def phase_of(log: str, phases: Sequence[tuple[str, str]]) -> str:
    """Return the phase of a process: the one of `phases` whose text is the last in its log."""
    reached = [(log.rfind(words), order) for order, (words, _) in enumerate(phases) if words in log]
    return phases[max(reached)[1]][1] if reached else "starting"


def open_connection(url: str, timeout: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=timeout)


def is_healthy(url: str) -> bool:
    """Return whether the engine or router at `url` reports that it is healthy."""
    connection = open_connection(url, 2.0)
    try:
        connection.request("GET", Endpoint.HEALTH)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def ask(
    url: str,
    method: str,
    body: object = None,
    *,
    path: str = RouterEndpoint.WORKERS,
    api_key: str | None = None,
    timeout: float = 10.0,
) -> tuple[int, dict[str, Any]]:
    """Send one request to an engine or a router, and return status and answer.

    Raises:
        OSError: there is no connection.
    """
    connection = open_connection(url, timeout)
    headers = {"Content-Type": "application/json", **authorization(api_key)}
    try:
        connection.request(method, path, json.dumps(body) if body else None, headers)
        answer = connection.getresponse()
        raw = answer.read()
        try:
            return answer.status, json.loads(raw)
        except json.JSONDecodeError:
            return answer.status, {"message": raw.decode(errors="replace")}
    finally:
        connection.close()
