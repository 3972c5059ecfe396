"""Write one checkpoint at a time in a thread, while this process goes on with training.

- Used by: the trainer begins its saves here; the loop asks later whether one is complete.
- Invariant: the thread uses no group of training, but a gloo group of its own: its messages never mix with those of a
  step. An error in it is raised by the next `finish`, on every rank.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from slime.megatron.checkpoint.snapshot import Snapshot
from slime.megatron.checkpoint.staging import Staging

LONGEST = timedelta(days=1)
"""The longest time that a rank may write after another one is done."""


@dataclass(frozen=True)
class Written:
    """A complete checkpoint, and the seconds from the beginning of its save until it had its name."""

    path: Path
    seconds: float


class Saver:
    """One rank's saves, one at a time. Its methods are collective."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._written: Written | None = None
        self._error: BaseException | None = None
        self.staging: Staging | None = None
        """The memory of the copies, since the first save."""

    def begin(self, take: Callable[..., Snapshot]) -> None:
        """Take a snapshot, whose copies are in the memory that `take` gets as `staging`, and begin to write it.

        If there was too little memory for the copies, this returns only when all is written.

        Raises:
            RuntimeError: the snapshot cannot be taken, or the checkpoint before it could not be written.
        """
        begin = time.perf_counter()
        if self._thread is not None:
            self.finish()  # it is written from the memory that this one takes
        if self._group is None or self.staging is None:
            group = dist.new_group(backend="gloo", timeout=LONGEST)
            assert isinstance(group, dist.ProcessGroup)
            self._group, self.staging = group, Staging(ranks_here=_ranks_here(group))
        group, snapshot = self._group, take(staging=self.staging)

        def work() -> None:
            try:
                path = snapshot.write(group)
                self._written = Written(path, time.perf_counter() - begin)
            except BaseException as error:  # noqa: BLE001  `finish` raises it
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()
        if not snapshot.is_copy:
            self._thread.join()

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> Written:
        """Wait until the checkpoint that was begun is complete, and return it.

        Raises:
            RuntimeError: it could not be written.
        """
        assert self._thread is not None, "nothing was begun"
        self._thread.join()
        written, error = self._written, self._error
        self._thread = self._written = self._error = None
        if error is not None:
            raise error
        assert written is not None
        return written


def _ranks_here(group: dist.ProcessGroup) -> int:
    """Return the number of ranks on this machine."""
    hosts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname(), group=group)
    return hosts.count(socket.gethostname())
