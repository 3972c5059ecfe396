"""The directory of a run: one run at a time, and no run's metrics lost to the next.

Path: the driver opens it before it starts anything. Invariant: whoever holds the lock is the only one that writes
here; the lock goes with the process, however it ends.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from slime.core.errors import RunError
from slime.observability.metrics_log import MetricsLog
from slime.observability.path_lock import PathLocks

METRICS = "metrics.jsonl"
_RUN_ID = re.compile(r"[\w.-]{1,100}")


@contextmanager
def _readable_errors(file: Path) -> Generator[Path]:
    """Raises RunError where `file` cannot be read or written."""
    try:
        yield file
    except OSError as error:
        raise RunError(
            f"{file}: cannot be used ({error.strerror or error}); move it away, or free some room"
        ) from error


class RunDirectory:
    """Holds the locks of `path`, of the other `directories` and of the `outputs` of the run until `close`.

    Raises:
        RunError: another process holds one of them, or one cannot be written.
    """

    def __init__(self, path: Path, directories: Sequence[Path] = (), outputs: Sequence[Path] = ()) -> None:
        self._locks = PathLocks([path, *directories], outputs)
        self.path = path

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def write_args(self, text: str) -> None:
        """The resolved arguments, as args.yaml."""
        with _readable_errors(self.path / "args.yaml") as file:
            file.write_text(text)

    def continue_metrics(self, step: int | None) -> tuple[MetricsLog, str | None]:
        """metrics.jsonl as the checkpoint of `step` had seen it, and a warning where lines of it are damaged.

        `step` None: the file stays as it is, for a run that trains nothing.
        """
        with _readable_errors(self.path / METRICS) as file:
            log = MetricsLog(file)
            warning = log.repair()
            if step is not None:
                log.rewind(step)
        return log, warning

    def new_metrics(self) -> MetricsLog:
        """An empty metrics.jsonl; an earlier run's is kept beside it as metrics-<n>.jsonl."""
        with _readable_errors(self.path / METRICS) as path:
            if path.exists() and path.stat().st_size:
                number = 1
                while (kept := self.path / f"metrics-{number}.jsonl").exists():
                    number += 1
                path.rename(kept)
            return MetricsLog(path)

    def run_id(self, *, new: bool) -> str:
        """What the run is called by trackers; one that goes on keeps its name."""
        with _readable_errors(self.logs / "run_id") as file:
            known = file.read_text(errors="replace") if file.exists() and not new else ""
            if _RUN_ID.fullmatch(known):
                return known
            self.logs.mkdir(parents=True, exist_ok=True)
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
            file.write_text(name)
            return name

    def close(self) -> None:
        self._locks.close()
