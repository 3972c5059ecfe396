"""Watchdog: ends the run when Ray itself does not answer.

- Where it sits: `ray_session` starts one before Ray. It is a thread, because the driver's own calls of Ray hang in that
  case, including those that would end Ray.
- Invariant: the error names the process that did not answer, and for how long. Silence counts only for a process that
  has answered before. Time in which this process itself was suspended (SIGSTOP, a sleeping machine) does not count.

Ray's control store (GCS) and the raylet of each node answer gRPC's standard health check.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from slime.core.awake import AwakeClock

PING_S = 2.0
PING_TIMEOUT_S = 10.0
CHECK = "/grpc.health.v1.Health/Check"
NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


@dataclass
class _Watched:
    name: str
    channel: Any
    call: Any = None
    has_answered: bool = False
    silence: float = 0.0


class Watchdog:
    """Ends the run after `limit` seconds of silence: it calls `end` once, in its thread, with what is wrong."""

    def __init__(self, *, limit: float, end: Callable[[str], None]) -> None:
        self._limit, self._end = limit, end
        self._watched: list[_Watched] = []
        self._expected: tuple[str, float] | None = None
        self._waited = 0.0
        self._closed = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def watch(self, addresses: Mapping[str, str]) -> None:
        """Check these gRPC servers, {name: host:port}, from now on."""
        with self._lock:
            self._watched = [_Watched(name, grpc.insecure_channel(address)) for name, address in addresses.items()]

    def expect(self, what: str, within: float) -> None:
        """Expect the main thread to finish `what` within so many seconds, and to call this or `expect_nothing` then.

        If `what` is expected already, its time limit is not extended.
        """
        with self._lock:
            if self._expected != (what, within):
                self._expected, self._waited = (what, within), 0.0

    def expect_nothing(self) -> None:
        with self._lock:
            self._expected = None

    def stop_asking(self) -> None:
        """Stop checking servers, because they are about to end."""
        with self._lock:
            watched, self._watched = self._watched, []
        for each in watched:
            each.channel.close()

    def close(self) -> None:
        self._closed.set()
        self.stop_asking()

    def _run(self) -> None:
        clock = AwakeClock(PING_S)
        while not self._closed.wait(PING_S):
            with self._lock:
                trouble = self._look(clock.tick())
            if trouble is not None and not self._closed.is_set():
                self._end(trouble)
                return

    def _look(self, seconds: float) -> str | None:
        """Return what is wrong, or None."""
        for each in self._watched:
            each.silence += seconds
            if each.call is not None and each.call.done():
                if each.call.code() not in NO_ANSWER:  # a refusal is an answer
                    each.has_answered, each.silence = True, 0.0
                each.call = None
            if each.call is None:
                each.call = each.channel.unary_unary(CHECK).future(b"", timeout=PING_TIMEOUT_S)
            if each.has_answered and each.silence > self._limit:
                return f"{each.name} has not answered for {self._limit:g} s"
        if self._expected is not None:
            self._waited += seconds
            what, within = self._expected
            if self._waited > within:
                return f"{what}: Ray has not done it within {within:g} s"
        return None
