"""RunFiles: the temporary directory of a run, and the removal of what dead runs have left.

- Used by: `ray_session` makes one for each start of the run; the `reaper` removes it.
- Invariant: another run removes a directory only if nobody holds its lock. The kernel releases the lock when a process
  dies, so neither the driver nor the reaper of that run is alive. A directory without a lock belongs to someone else.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path

from slime.core.marks import marked

PREFIX = "slime-run-"
LOCK, RECORD = "lock", "run.json"


class RunFiles:
    """The temporary directory `path` of one run, and a descriptor `lock` that holds its lock for the reaper, too."""

    def __init__(self, mark: str) -> None:
        remove_stale()
        self._mark = mark
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self.record(None)
        new = self.path / "lock.new"
        self.lock = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        new.rename(self.path / LOCK)  # whoever sees the file finds it locked

    def record(self, session: str | None) -> None:
        """Record what another run needs to clean up after this one. `session` is the directory of its own Ray."""
        (self.path / RECORD).write_text(json.dumps({"mark": self._mark, "session": session}))

    def close(self) -> None:
        """Remove the directory, if the reaper has not done so."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)


def remove_stale() -> None:
    """Remove the directories of this user's runs that have no process left, and the directories of their Rays."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if path.lstat().st_uid != os.getuid() or path.is_symlink():
                continue
            lock = os.open(path / LOCK, os.O_RDWR)
        except OSError:
            continue  # it has no lock, or was just removed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            record = json.loads((path / RECORD).read_text())
            if not marked(record["mark"]):
                remove_session(record["session"])
                shutil.rmtree(path, ignore_errors=True)
        except (OSError, ValueError, KeyError):
            continue  # its run is alive, or another run is removing it
        finally:
            os.close(lock)


def remove_session(session: str | None) -> None:
    """Remove the session directory of a Ray that a run started, and Ray's own directory if nothing else is in it."""
    if session is None:
        return
    directory = Path(session)
    shutil.rmtree(directory, ignore_errors=True)
    latest = directory.with_name("session_latest")
    if latest.is_symlink() and not latest.exists():
        latest.unlink(missing_ok=True)
    try:
        directory.parent.rmdir()
    except OSError:
        return  # it holds other sessions
