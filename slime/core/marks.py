"""The mark of a run: an environment variable that every process of the run inherits.

- Used by: the driver sets it before it starts anything; the `reaper` finds the run's processes by it.
- Invariant: a mark is random and belongs to one start of one run. A process with the mark was started by that run, even
  if another process has adopted it since.
"""

from __future__ import annotations

import os
import secrets

VARIABLE = "SLIME_RUN"


def new_mark() -> str:
    """Set a new mark, which everything that this process starts from now on inherits; return it."""
    os.environ[VARIABLE] = mark = secrets.token_hex(8)
    return mark


def marked(mark: str) -> list[int]:
    """Return the ids of this user's processes that were started with the mark in their environment, without zombies."""
    wanted, user = f"{VARIABLE}={mark}".encode(), os.getuid()
    found: list[int] = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid != user:
                continue
            with open(f"/proc/{name}/environ", "rb") as file:
                if wanted in file.read().split(b"\0"):
                    found.append(int(name))
        except OSError:
            continue  # it has ended in the meantime
    return found
