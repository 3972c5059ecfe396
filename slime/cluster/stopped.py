"""Names processes that are stopped (SIGSTOP, a debugger), for errors about something that does not answer.

Path: the driver's waits and its watchdog add this to what they say. Invariant: it only reads /proc, so that it hangs at
nothing that hangs.
"""

from __future__ import annotations

from contextlib import suppress

import psutil

NAME_LENGTH = 60


def stopped_below(parent: psutil.Process) -> str:
    """' (stopped: NAME, pid N; ...)' for every stopped process that `parent` has started; '' if there is none."""
    found: list[str] = []
    with suppress(psutil.NoSuchProcess):
        for process in parent.children(recursive=True):
            with suppress(psutil.Error):
                if process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                    name = (process.cmdline() or [process.name()])[0].rpartition("/")[2][:NAME_LENGTH]
                    found.append(f"{name}, pid {process.pid}")
    return f" (stopped: {'; '.join(found)})" if found else ""
