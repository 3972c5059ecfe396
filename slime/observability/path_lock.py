"""A lock on each place that a run writes to or cleans up: one run at a time, whatever its other flags are.

- Used by: `run_directory`, for each place that a run writes to, and the converter, for its output.
- Invariant: the kernel holds the lock (flock) and releases it when the process ends, however it ends. The file's
  content only names the holder.

Over NFS, Linux turns flock into a lock at the server, so it works between machines. On a file system without locks, the
run continues with a warning.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TextIO

from slime.core.errors import RunError

logger = logging.getLogger(__name__)
LOCK = ".lock"


class PathLocks:
    """Holds the locks of `directories` and of `outputs` until `close`.

    An output is a file or directory that is replaced as a whole, or a template for such paths, like `hf/{rollout_id}`;
    its lock is a file next to it.

    Raises:
        RunError: another process holds one of the locks, or one cannot be written. Locks already taken are released.
    """

    def __init__(self, directories: Iterable[Path], outputs: Iterable[Path] = ()) -> None:
        files = [path.resolve() / LOCK for path in directories] + [_lock_next_to(path) for path in outputs]
        with ExitStack() as stack:
            for file in dict.fromkeys(files):
                stack.enter_context(_locked(file))
            self._held = stack.pop_all()

    def __enter__(self) -> PathLocks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._held.close()


def _lock_next_to(output: Path) -> Path:
    """Return `.<name>.lock` next to the output; for a template, next to the first part that differs between outputs."""
    parts = output.absolute().parts
    number = next((number for number, part in enumerate(parts) if "{" in part), len(parts) - 1)
    return Path(*parts[:number]).resolve() / f".{parts[number]}{LOCK}"


def _locked(file: Path) -> TextIO:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = file.open("a+", encoding="utf-8")
        try:
            _take(file, opened)
        except BaseException:
            opened.close()
            raise
    except OSError as error:
        raise RunError(
            f"{file.parent}: the run cannot write there ({error.strerror or error}); free some room, give yourself the "
            "permission, or name another directory (--save, --log-dir, or the flag that names this one)"
        ) from error
    return opened


def _take(file: Path, opened: TextIO) -> None:
    """Take the lock.

    Raises:
        RunError: another process holds it.
        OSError: nothing can be written.
    """
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            logger.warning("%s: no locks there (%s): a second run in the same place is not noticed", file, error)
            return
        opened.seek(0)
        holder = opened.read(200).strip() or "another process"
        raise RunError(
            f"{file.parent}: in use by {holder} ({file}); two runs would overwrite each other's checkpoints and "
            "metrics: name another directory (--save, --log-dir, or the flag that names this one), or wait"
        ) from None
    opened.truncate(0)
    opened.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    opened.flush()
