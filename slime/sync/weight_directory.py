"""WeightDirectory: the place where weights are written on their way to the engines.

- Used by: the driver holds one for the whole run. Trainer rank 0 writes into it, for `disk` and for the `proof` of a
  sync.
- Invariant: it belongs to one run, and holds nothing of that run before and after. Other files in it are left alone.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
from pathlib import Path

LOCK = ".slime-weights.lock"
PROOF = "weights-proof"
"""The name of the export that a sync is compared with."""
_OWN = re.compile(r"(\.tmp_(old_)?)?weights-(v\d{6,}|proof)")


class WeightDirectory:
    """A directory for weights on their way, held by one run; its own files are removed at the start and the end."""

    def __init__(self, path: Path) -> None:
        """Create and lock the directory, and remove what a killed run left.

        Raises:
            ValueError: another run holds it.
        """
        path.mkdir(parents=True, exist_ok=True)
        self.path = path.absolute()
        self._lock = (self.path / LOCK).open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._lock.fileno()).st_nlink == 0:
                raise BlockingIOError  # its holder is just leaving, and has removed the lock file
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise ValueError(
                f"--update-weight-disk-dir {path}: {holder} sends weights through it; one run's engines would load "
                "another's: give this one a directory of its own, or wait"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()
        remove_weights(self.path)

    def close(self) -> None:
        """Remove all weights and the lock, and the directory if it is empty."""
        if self.path.is_dir():
            remove_weights(self.path)
            (self.path / LOCK).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()
        self._lock.close()


def remove_weights(directory: Path, *, keep: Path | None = None) -> None:
    """Remove all versions in `directory`, whole or half-written, except `keep`; other files are left alone."""
    for entry in directory.iterdir():
        if entry != keep and _OWN.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
