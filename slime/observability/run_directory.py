"""The directory of a run: one run at a time, and no run's metrics lost to the next.

Path: the driver opens it before it starts anything. Invariant: whoever holds the lock is the only one that writes
here; the lock goes with the process, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from pathlib import Path

from slime.core.errors import RunError
from slime.observability.metrics_log import MetricsLog

LOCK = ".lock"
METRICS = "metrics.jsonl"


class RunDirectory:
    """Holds the lock until `close`.

    Raises:
        RunError: another process holds it.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = (path / LOCK).open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise RunError(
                f"{path}: process {holder} runs in this directory; two runs would overwrite each other's checkpoints "
                "and metrics: give this one another --save (or --log-dir), or wait"
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def write_args(self, text: str) -> None:
        """The resolved arguments, as args.yaml."""
        (self.path / "args.yaml").write_text(text)

    def continue_metrics(self, step: int | None) -> MetricsLog:
        """metrics.jsonl as the checkpoint of `step` had seen it; None: as it is, for a run that trains nothing."""
        log = MetricsLog(self.path / METRICS)
        if step is not None:
            log.rewind(step)
        return log

    def new_metrics(self) -> MetricsLog:
        """An empty metrics.jsonl; an earlier run's is kept beside it as metrics-<n>.jsonl."""
        path = self.path / METRICS
        if path.exists() and path.stat().st_size:
            number = 1
            while (kept := self.path / f"metrics-{number}.jsonl").exists():
                number += 1
            path.rename(kept)
        return MetricsLog(path)

    def run_id(self, *, new: bool) -> str:
        """What the run is called by trackers; one that goes on keeps its name."""
        file = self.logs / "run_id"
        if new or not file.exists():
            self.logs.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
        return file.read_text()

    def close(self) -> None:
        self._lock.close()
