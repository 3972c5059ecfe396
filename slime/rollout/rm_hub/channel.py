"""What the reward pool and one of its processes say to each other: frames over a socket, and a page of shared memory.

Path: `process` holds one end, `worker` the other. Invariant: the page says which task runs in the process even where
the process can say nothing any more (it hangs in C code, or is dead).
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Iterator

HEADER = struct.Struct("<qQ")
"""Number of the task, bytes of what follows. An empty frame to the worker calls the task off."""
START = 0
"""Number of the first frame each way: the Args to the worker, and its process id back when it is ready."""


def pack(number: int, payload: bytes) -> bytes:
    return HEADER.pack(number, len(payload)) + payload


def unpack(buffer: bytearray) -> Iterator[tuple[int, bytes]]:
    """The whole frames in `buffer`, taken out of it."""
    while len(buffer) >= HEADER.size:
        number, length = HEADER.unpack_from(buffer)
        end = HEADER.size + length
        if len(buffer) < end:
            return
        payload = bytes(buffer[HEADER.size : end])
        del buffer[:end]
        yield number, payload


class Page:
    """Two integers that the worker writes and its owner reads."""

    SIZE = 16

    def __init__(self, fd: int) -> None:
        self._memory = memoryview(mmap.mmap(fd, self.SIZE)).cast("q")

    @staticmethod
    def make_file() -> int:
        """The descriptor of a new page, all zero, which has no name on disk."""
        with tempfile.TemporaryFile() as file:
            file.truncate(Page.SIZE)
            return os.dup(file.fileno())

    @property
    def running(self) -> int:
        """The task whose code runs this moment; 0: none (it waits, or code of none of them runs)."""
        return self._memory[0]

    @property
    def beat(self) -> int:
        """Changes while the worker gets anywhere."""
        return self._memory[1]

    def enter(self, number: int) -> None:
        self._memory[0] = number
        self._memory[1] += 1

    def leave(self) -> None:
        self._memory[0] = 0
        self._memory[1] += 1
