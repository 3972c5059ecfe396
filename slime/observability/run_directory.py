"""The directory of a run: used by one run at a time, and later runs never overwrite its metrics.

- Used by: the driver, which opens it before it starts anything.
- Invariant: only the holder of the lock writes here; the lock is released when the process ends, however it ends.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from slime.core.errors import RunError
from slime.observability.metrics_log import MetricsLog
from slime.observability.path_lock import PathLocks
from slime.observability.samples_file import SAMPLES, rewind_samples

METRICS = "metrics.jsonl"
_RUN_ID = re.compile(r"[\w.-]{1,100}")


@contextmanager
def _readable_errors(file: Path) -> Generator[Path]:
    """Turn an OSError about `file` into a RunError with a remedy."""
    try:
        yield file
    except OSError as error:
        raise RunError(
            f"{file}: cannot be used ({error.strerror or error}); move it away, or free some room"
        ) from error


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def make_directory(folder: Path, name: str | None) -> Path:
    """Make a new directory for a run and return its whole path: `folder`/`name`, or one named after the time.

    A name that exists gets a number: `name`-2. Two runs that start at once get two directories, because making a
    directory that exists fails.

    Raises:
        RunError: none can be made.
    """
    name = time.strftime("%Y%m%d-%H%M%S") if name is None else name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            path = folder.absolute() / (name if number == 1 else f"{name}-{number}")
            with suppress(FileExistsError):
                path.mkdir()
                return path
    except OSError as error:
        raise RunError(
            f"{folder.absolute()}: the run cannot make its directory there ({error.strerror or error}); free some "
            "room, give yourself the permission, or name another directory with --save"
        ) from error
    raise AssertionError("numbers do not end")


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
        """Write the resolved arguments as args.yaml."""
        with _readable_errors(self.path / "args.yaml") as file:
            file.write_text(text)

    def continue_metrics(self, step: int | None) -> tuple[MetricsLog, list[str]]:
        """Return metrics.jsonl as it was at the checkpoint of `step`, and warnings if lines of it are damaged.

        The same is done with samples.jsonl. With `step` None the files are not changed, for a run that trains nothing.
        """
        with _readable_errors(self.path / METRICS) as file:
            log = MetricsLog(file)
            warnings = [log.repair()]
            if step is not None:
                log.rewind(step)
        with _readable_errors(self.path / SAMPLES) as file:
            warnings.append(rewind_samples(file, step))
        return log, [warning for warning in warnings if warning is not None]

    def new_metrics(self) -> MetricsLog:
        """Return an empty metrics.jsonl; an earlier run's is kept as metrics-<n>.jsonl, and its samples likewise."""
        earlier = [path for path in (self.path / METRICS, self.path / SAMPLES) if path.exists() and path.stat().st_size]
        number = 1
        while any(_numbered(self.path / name, number).exists() for name in (METRICS, SAMPLES)):
            number += 1
        for path in earlier:
            with _readable_errors(path):
                path.rename(_numbered(path, number))
        with _readable_errors(self.path / METRICS) as path:
            return MetricsLog(path)

    def run_id(self, *, new: bool) -> str:
        """Return the name of the run for trackers; a resumed run keeps its name."""
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
