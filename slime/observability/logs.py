"""A log file for each process of a run.

Path: every process calls `log_to_file` once at its start. Invariant: workers write to their own file; the console
belongs to the driver, which also shows what workers warned of while they started.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from slime.core.masking import Masker

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


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
    """Masks the whole text of a record, its traceback included."""

    def __init__(self, masker: Masker) -> None:
        super().__init__(FORMAT)
        self._masker = masker

    def format(self, record: logging.LogRecord) -> str:
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
    """The warnings that slime's own modules log inside the block."""
    collector = _Collector()
    root = logging.getLogger()
    root.addHandler(collector)
    try:
        yield collector.messages
    finally:
        root.removeHandler(collector)
