"""A run in a terminal of its own, in which a test types Ctrl-C."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress

from tests.cluster.runs import ROOT, as_in_a_terminal, environment

CTRL_C = b"\x03"


class Terminal:
    """The terminal of a `process`, which leads its session, as a shell's command leads the foreground group."""

    def __init__(self, process: subprocess.Popen[bytes], keyboard: int) -> None:
        self.process = process
        self._keyboard = keyboard
        self._shown = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def type(self, keys: bytes) -> None:
        os.write(self._keyboard, keys)

    def wait(self, timeout: float) -> tuple[int, str]:
        """Wait for the end; return the exit status and all that was shown, with plain line ends."""
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code, self._shown.decode(errors="replace").replace("\r\n", "\n")

    def _read(self) -> None:
        with suppress(OSError):  # Linux reports the end of a terminal as an error
            while data := os.read(self._keyboard, 65536):
                self._shown += data


def _take_terminal() -> None:
    """Make the terminal at standard input the controlling one of this new session."""
    as_in_a_terminal()
    os.close(os.open(os.ttyname(0), os.O_RDWR))


@contextmanager
def in_a_terminal(arguments: list[str], program: str) -> Generator[Terminal]:
    """Start the program in a terminal; it is killed if it still runs after the block."""
    keyboard, screen = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / program), *arguments],
        cwd=ROOT,
        env={**environment(), "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
        stdin=screen,
        stdout=screen,
        stderr=screen,
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(screen)
    try:
        yield Terminal(process, keyboard)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(keyboard)
