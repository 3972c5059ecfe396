"""The watchdog names what does not answer, and tolerates what it has to."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from slime.cluster.life import watchdog as module
from slime.cluster.life.watchdog import Watchdog

SERVER = """
import grpc, time
from concurrent.futures import ThreadPoolExecutor
answer = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
server = grpc.server(ThreadPoolExecutor(1))
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": answer})])
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
time.sleep(600)
"""
LIMIT_S = 1.5


class Ends:
    """Collects the messages with which the watchdog ends a run."""

    def __init__(self) -> None:
        self.troubles: list[str] = []
        self._event = threading.Event()

    def __call__(self, trouble: str) -> None:
        self.troubles.append(trouble)
        self._event.set()

    def within(self, seconds: float) -> bool:
        return self._event.wait(seconds)


@contextmanager
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, f"127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


def test_only_the_stopped_server_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PING_S", 0.1)
    ends = Ends()
    with server() as (process, address):
        watchdog = Watchdog(limit=LIMIT_S, end=ends)
        watchdog.watch({"the GCS": address, "nobody who has ever answered": "127.0.0.1:1"})
        assert not ends.within(2 * LIMIT_S), "control: what answers is well"
        process.send_signal(signal.SIGSTOP)
        assert ends.within(60)
        assert ends.troubles == [f"the GCS has not answered for {LIMIT_S:g} s"]
        watchdog.close()


def test_an_unfinished_task_of_the_driver_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PING_S", 0.1)
    ends = Ends()
    watchdog = Watchdog(limit=LIMIT_S, end=ends)
    watchdog.expect("one thing", 600)
    watchdog.expect("another thing", 0.5)
    watchdog.expect_nothing()
    assert not ends.within(1)
    watchdog.expect("ending the run", 0.5)
    assert ends.within(60)
    assert ends.troubles == ["ending the run: Ray has not done it within 0.5 s"]


def test_suspended_time_does_not_count() -> None:
    """The process that waits is stopped for longer than its limit, as on a machine that sleeps."""
    code = (
        "import sys, time\n"
        "from slime.cluster.life import watchdog\n"
        "watchdog.PING_S = 0.1\n"
        "dog = watchdog.Watchdog(limit=1, end=lambda trouble: print(trouble, flush=True))\n"
        "dog.expect('a long thing', 2.0)\n"
        "print('started', flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        go_on = time.monotonic()
        process.send_signal(signal.SIGCONT)
        assert "a long thing" in process.stdout.readline(), "control: the limit holds all the same"
        assert time.monotonic() - go_on > 1
        process.kill()
