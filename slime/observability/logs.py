"""A log file for each process of a run.

Path: every process calls `log_to_file` once at its start. Invariant: workers write to their own file; the console
belongs to the driver.
"""

from __future__ import annotations

import logging
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_to_file(directory: Path, name: str) -> Path:
    """Send this process's logging (INFO and above) to `directory/name.log`."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.log"
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    return path
