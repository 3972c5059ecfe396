"""The channel between the reward pool and one of its processes: frames over a socket, and a page of shared memory.

- Used by: `process` holds one end, and `worker` the other.
- Invariant: the page shows which task runs in the process even if the process cannot answer any more (it hangs in C
  code, or is dead).
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Iterator

HEADER = struct.Struct("<qQ")
"""The number of the task and the length of the payload in bytes. An empty payload to the worker cancels the task."""
START = 0
"""The number of the first frame each way: the Args to the worker, and its process id back when it is ready."""


def pack(number: int, payload: bytes) -> bytes:
    return HEADER.pack(number, len(payload)) + payload


def unpack(buffer: bytearray) -> Iterator[tuple[int, bytes]]:
    """Remove the whole frames from `buffer` and yield them."""
    while len(buffer) >= HEADER.size:
        number, length = HEADER.unpack_from(buffer)
        end = HEADER.size + length
        if len(buffer) < end:
            return
        payload = bytes(buffer[HEADER.size : end])
        del buffer[:end]
        yield number, payload


class Page:
    """Two integers in shared memory that the worker writes and its owner reads."""

    SIZE = 16

    def __init__(self, fd: int) -> None:
        self._memory = memoryview(mmap.mmap(fd, self.SIZE)).cast("q")

    @staticmethod
    def make_file() -> int:
        """Return the descriptor of a new page, all zero, which has no name on disk."""
        with tempfile.TemporaryFile() as file:
            file.truncate(Page.SIZE)
            return os.dup(file.fileno())

    @property
    def running(self) -> int:
        """The task whose code runs at this moment; 0 if all tasks wait."""
        return self._memory[0]

    @property
    def beat(self) -> int:
        """A counter that changes while the worker makes progress."""
        return self._memory[1]

    def enter(self, number: int) -> None:
        self._memory[0] = number
        self._memory[1] += 1

    def leave(self) -> None:
        self._memory[0] = 0
        self._memory[1] += 1
