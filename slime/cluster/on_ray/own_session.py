"""Start Ray's processes in sessions of their own, where signals to the driver's process group do not reach them.

- Used by: `placement`, around the start of a local Ray.
- Invariant: Ctrl-C in a terminal, and `timeout` or a job system that signals the whole group, reach the driver alone,
  which decides what is saved before anything ends.

Ray has no option for this. It starts its processes with a `preexec_fn`, so that the hooks of `os.register_at_fork` run
in each of them before its program does. The test with Ctrl-C in tests/cluster/test_async.py notices a Ray that does
without.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache


class _Switch:
    on = False


def _leave_session() -> None:
    if _Switch.on:
        os.setsid()


@cache
def _register() -> None:
    os.register_at_fork(after_in_child=_leave_session)


@contextmanager
def children_in_own_sessions() -> Generator[None]:
    """Give every process that is forked in the block a session of its own."""
    _register()
    _Switch.on = True
    try:
        yield
    finally:
        _Switch.on = False
