"""Name the processes that are stopped (SIGSTOP, a debugger), for errors about something that does not answer.

- Called by: the driver's waits and its watchdog add this to their errors.
- Invariant: it reads only /proc, so it cannot hang on a process that hangs.
"""

from __future__ import annotations

from contextlib import suppress

import psutil

NAME_LENGTH = 60


def stopped_below(parent: psutil.Process) -> str:
    """Return ' (stopped: NAME, pid N; ...)' for the stopped processes that `parent` has started; '' without any."""
    found: list[str] = []
    with suppress(psutil.NoSuchProcess):
        for process in parent.children(recursive=True):
            with suppress(psutil.Error):
                if process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                    name = (process.cmdline() or [process.name()])[0].rpartition("/")[2][:NAME_LENGTH]
                    found.append(f"{name}, pid {process.pid}")
    return f" (stopped: {'; '.join(found)})" if found else ""
