"""One log file for each process of a run.

- Used by: every process, which calls `log_to_file` once when it starts.
- Invariant: workers write to their own files. The console belongs to the driver, which also shows the warnings that
  workers logged while they started.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from slime.core.about import prefix
from slime.core.masking import Masker

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(about)s%(message)s"
"""`about` is the sample that the process works on, if that is known."""


def log_to_file(directory: Path, name: str, masker: Masker) -> Path:
    """Send this process's logging (INFO and above) to `directory/name.log`; `masker` hides the run's secrets in it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.log"
    handler = logging.FileHandler(path)
    handler.setFormatter(_MaskedFormatter(masker))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    return path


class _MaskedFormatter(logging.Formatter):
    """Masks the whole text of a record, including its traceback."""

    def __init__(self, masker: Masker) -> None:
        super().__init__(FORMAT)
        self._masker = masker

    def format(self, record: logging.LogRecord) -> str:
        record.about = prefix()
        return self._masker(super().format(record))


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("slime"):
            self.messages.append(record.getMessage())


@contextmanager
def collected_warnings() -> Generator[list[str]]:
    """Collect the warnings that slime's own modules log inside the block."""
    collector = _Collector()
    root = logging.getLogger()
    root.addHandler(collector)
    try:
        yield collector.messages
    finally:
        root.removeHandler(collector)
