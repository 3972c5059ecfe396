"""OutputLog: a log file of what a process prints, also from native code and from programs that it starts.

- Used by: each reward worker's owner, and the rollout manager for its own output.
- Invariant: secrets are masked, lines appear when they end, and a flood of lines cannot fill the disk: at most BURST
  bytes at once and RATE bytes a second are written. What is left out is counted.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path
from typing import TextIO

from slime.core.about import label_output
from slime.core.masking import Masker

MARK = b"\x1e"
"""The byte before the name of what the following lines are about, in a line of its own."""
BURST = 1 << 20
RATE = 1 << 10
_LONGEST_LINE = 64 << 10
"""Bytes; a longer line is written in parts."""


class OutputLog:
    """Appends what arrives at the descriptor `end` to a file, in a thread, until everyone has closed that end."""

    def __init__(self, path: Path, masker: Masker) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._masker = masker
        self._about = ""
        self._room, self._seen = float(BURST), time.monotonic()
        self._left_out = 0
        self._file = path.open("a", encoding="utf-8", errors="replace")
        self._source, self.end = os.pipe()
        self._thread = threading.Thread(target=self._copy, name=f"output of {path.name}", daemon=True)
        self._thread.start()

    def close_end(self) -> None:
        """Close this process's copy of `end`, once the process that writes has its own."""
        os.close(self.end)

    def join(self, timeout: float) -> None:
        """Wait until everything is written; all copies of `end` are closed."""
        self._thread.join(timeout)

    def _copy(self) -> None:
        rest = b""
        with self._file:
            while chunk := os.read(self._source, 1 << 16):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._take(line)
                if len(rest) > _LONGEST_LINE:
                    self._take(rest)
                    rest = b""
                self._file.flush()
            if rest:
                self._take(rest)
            self._note()
        os.close(self._source)

    def _take(self, line: bytes) -> None:
        """Write one line, unless it is too much; a mark in it changes what the next lines are about."""
        line, mark, about = line.partition(MARK)
        if line or not mark:
            size = len(line) + len(self._about) + 1
            if size > self._room:
                now = time.monotonic()
                self._room = min(float(BURST), self._room + RATE * (now - self._seen))
                self._seen = now
            if size > self._room:
                self._left_out += 1
            else:
                self._room -= size
                self._note()
                self._file.write(f"{self._about}{self._masker(line.decode(errors='replace'))}\n")
        if mark:
            self._about = f"{about.decode(errors='replace')}: " if about else ""

    def _note(self) -> None:
        if self._left_out:
            self._file.write(f"({self._left_out:,} lines are left out: too much output at once)\n")
            self._left_out = 0


_CRASHES: list[TextIO] = []
"""The files for the traceback of a crash; they stay open as long as the process lives."""


def log_own_output(path: Path, masker: Masker) -> None:
    """Append what this process and its children print to `path` from now on; a crash leaves its traceback there."""
    log = OutputLog(path, masker)
    os.dup2(log.end, 1)
    os.dup2(log.end, 2)
    log.close_end()
    label_output()
    _CRASHES.append(path.open("a"))
    faulthandler.enable(_CRASHES[-1])
