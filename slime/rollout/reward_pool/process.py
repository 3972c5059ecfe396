"""RewardProcess: one worker process of the reward pool, as its owner sees it.

- Used by: `pool` sends it tasks. It calls the pool back with answers, and once when it is lost.
- Invariant: nothing here waits. The pool kills a worker that hangs, and hands out its tasks again.

A worker runs under a guard (`core.process_guard`): whatever a reward function started ends with it, also in a new
session. The worker is a fresh interpreter that loads the reward function and nothing else. (The pools of
multiprocessing and pebble import the parent's main module again in each worker, which inside Ray means Ray.)
"""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from slime.config.args import Args
from slime.config.secrets import masker_of
from slime.core.process_guard import END_AT_ONCE, GUARD
from slime.observability.output_log import OutputLog
from slime.rollout.reward_pool.channel import START, Page, pack, unpack
from slime.rollout.reward_pool.verdict import Verdict

Answered = Callable[["RewardProcess", int, bytes], None]
"""Called with the number of a task, or START, and the payload of the answer."""
Lost = Callable[["RewardProcess"], None]
_LAST_WORDS = 5.0
"""Seconds for the last output of a worker; a process that it started may hold the pipe open."""
_WORKER = (sys.executable, "-m", "slime.rollout.reward_pool.worker")


@dataclass(eq=False)
class Task:
    """One call of the reward function."""

    number: int
    payload: bytes
    done: asyncio.Future[list[Verdict]]
    alone: bool = False
    """Whether it runs without other tasks, because a worker was lost and it is not known which task was at fault."""


async def start_process(
    args: Args, answered: Answered, lost: Lost, *, place: int = 0, log: Path | None = None
) -> RewardProcess:
    """Start a worker process in the running event loop. It calls `answered` with START when it is ready.

    What it prints goes to the file `log`, or (None) where this process prints. `place` is its number among the workers.

    Raises:
        OSError: the machine has no room for another process; or whatever pickle raises for `args`.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        transport, _ = await asyncio.get_running_loop().create_unix_connection(asyncio.Protocol, sock=ours)
        try:
            return RewardProcess(args, transport, theirs, answered, lost, place=place, log=log)
        except BaseException:
            transport.abort()
            raise


class RewardProcess(asyncio.Protocol):
    """A worker process. `tasks` are in flight; `silence` is how long nothing has moved, as measured by `look`.

    A worker that is `retired` gets no more tasks, and ends with its last one.
    """

    def __init__(
        self,
        args: Args,
        transport: asyncio.WriteTransport,
        theirs: socket.socket,
        answered: Answered,
        lost: Lost,
        *,
        place: int = 0,
        log: Path | None = None,
    ) -> None:
        """Start the worker with the end `theirs` of a connection; `transport` is the other end."""
        self.tasks: dict[int, Task] = {}
        self.place = place
        self.ready = False
        self.retired = False
        self.silence = 0.0
        self.pid = 0
        """The worker's process id, once it is ready. `process` is its guard, which ends with it."""
        self._answered, self._lost = answered, lost
        self._buffer = bytearray()
        self._beat = 0
        self._bytes_at_start = 0
        self._transport = transport
        first = pickle.dumps(args)
        page = Page.make_file()
        search_path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        ends = (theirs.fileno(), page)
        words = [str(end) for end in ends]
        self._output = output = None if log is None else OutputLog(log, masker_of(args))
        try:
            self.process = subprocess.Popen(
                [*GUARD, "-", f"keep={','.join(words)}", "--", *_WORKER, *words, *([] if log is None else ["logged"])],
                stdin=subprocess.PIPE,
                bufsize=0,
                stdout=subprocess.DEVNULL,  # the guard prints the worker's process id, which the worker sends itself
                stderr=None if output is None else output.end,  # the guard passes it on as the worker's whole output
                pass_fds=ends,
                env={**os.environ, "PYTHONPATH": search_path, "PYTHONUNBUFFERED": "1"},
            )
            self._page = Page(page)
        finally:
            os.close(page)
            if output is not None:
                output.close_end()
        transport.set_protocol(self)
        self._write(START, first)

    def started(self, pid: int) -> None:
        """Record that the worker is ready, as process `pid`; memory that it takes from here on belongs to its tasks."""
        self.ready = True
        self.pid = pid
        self._bytes_at_start = self._resident_bytes()

    @property
    def grown(self) -> int:
        """The bytes of memory that the worker holds beyond those with which it started."""
        return self._resident_bytes() - self._bytes_at_start

    def _resident_bytes(self) -> int:
        try:
            return psutil.Process(self.pid).memory_info().rss
        except psutil.Error:  # the worker has died, which is noticed elsewhere
            return self._bytes_at_start

    def send(self, task: Task) -> None:
        if not self.tasks:
            self.silence = 0.0
        self.tasks[task.number] = task
        self._write(task.number, task.payload)

    def call_off(self, number: int) -> None:
        """Cancel a task that nobody waits for any more; a plain function runs to its end, and its answer is dropped."""
        self._write(number, b"")

    def _write(self, number: int, payload: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(pack(number, payload))

    def look(self, seconds: float) -> None:
        """Update `silence`; called every `seconds` while the worker has tasks."""
        beat = self._page.beat
        self.silence = self.silence + seconds if beat == self._beat else 0.0
        self._beat = beat

    @property
    def running(self) -> int:
        """The task whose code runs, or ran when the worker died; 0 means none."""
        return self._page.running

    @property
    def runs_alone(self) -> bool:
        """Whether the worker has a task that must not run together with others."""
        return len(self.tasks) == 1 and next(iter(self.tasks.values())).alone

    @property
    def has_died(self) -> bool:
        """Whether the worker has died, also if a child of its own keeps the connection open."""
        return self.process.poll() is not None

    def kill(self) -> None:
        """End the worker and whatever its reward functions started, without waiting until they are gone.

        This may be called any number of times; `lost` is not called after it.
        """
        self.end()
        self._lost = _nothing
        self._transport.abort()

    def end(self) -> None:
        """Do the part of `kill` that needs no event loop."""
        assert self.process.stdin is not None, "it was opened with a pipe"
        if not self.process.stdin.closed:
            with suppress(BrokenPipeError):  # the guard has ended already
                self.process.stdin.write(END_AT_ONCE)
            self.process.stdin.close()

    def wait(self) -> None:
        """Wait until a worker that was killed is gone and its output is written."""
        self.process.wait()
        if self._output is not None:
            self._output.join(_LAST_WORDS)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        for number, payload in unpack(self._buffer):
            self._answered(self, number, payload)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost(self)


def _nothing(process: RewardProcess) -> None: ...
