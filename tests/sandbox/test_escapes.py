"""Attempts to escape: each one is contained with its outcome, and nothing of it is left when the run has ended."""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from slime.sandbox.run import Ended, Limits, Running, SandboxFault, refusal
from tests.sandbox.attempts import ATTEMPTS

LIMITS = Limits(
    wall_seconds=10, cpu_seconds=1, memory_bytes=200 << 20, processes=24, output_bytes=1 << 20, disk_bytes=16 << 20
)
pytestmark = pytest.mark.skipif(refusal("namespaces") is not None, reason="this kernel gives us no namespaces")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """Put things on this machine that a program must not reach from the sandbox."""
    directory = tmp_path_factory.mktemp("host")
    (directory / "file").write_text("secret")
    (directory / "planted_module.py").write_text("")
    shared = Path(f"/dev/shm/slime-test-{os.getpid()}")
    shared.write_text("secret")
    abstract, path = f"slime-test-{os.getpid()}", str(directory / "s")
    sockets = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    sockets[1].bind(f"\0{abstract}")
    sockets[2].bind(path)
    for each in sockets:
        each.listen(5)
    yield {
        "port": sockets[0].getsockname()[1], "abstract": abstract, "socket": path, "file": str(directory / "file"),
        "shared": str(shared), "pid": os.getpid(), "path": str(directory),
    }  # fmt: skip
    for each in sockets:
        each.close()
    shared.unlink()


def with_host(program: str, host: dict[str, object]) -> str:
    return f"HOST = {host!r}\nX86 = {platform.machine() == 'x86_64'}\n{program}"


def run_and_see_the_end(program: str, limits: Limits = LIMITS) -> Ended:
    """Run a program that holds a channel, and check that nobody holds it when the run has ended."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            running = Running(program, kind="namespaces", limits=limits, channel=theirs.fileno())
        ended = running.wait()
        ours.settimeout(10)
        assert ours.recv(1) == b"", "a process of the sandbox still holds the channel"
    return ended


@pytest.mark.parametrize("name", ATTEMPTS)
def test_an_attempt_is_contained(
    name: str, host: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = ATTEMPTS[name]
    program = with_host(attempt.program, host)
    monkeypatch.setenv("PLANTED", "secret")
    monkeypatch.setenv("PYTHONPATH", str(host["path"]))
    # What is only ended by time need not take long. What uses CPU is in `test_running`, with the limit that ends it.
    ended = run_and_see_the_end(program, replace(LIMITS, wall_seconds=1) if attempt.outcome == "timeout" else LIMITS)
    assert (ended.outcome, b"ESCAPED" in ended.stdout) == (attempt.outcome, False), ended
    assert len(ended.stdout) + len(ended.stderr) <= 2 * LIMITS.output_bytes
    if attempt.control:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=tmp_path)
        assert b"ESCAPED" in done.stdout, f"control: it has to succeed outside: {done.stderr.decode()}"


STARTS = """
import sys, time
from slime.sandbox.run import Limits, Running
Running(sys.argv[2], kind="namespaces", limits=Limits(wall_seconds=60), channel=int(sys.argv[1]))
time.sleep(60)
"""


def test_a_dead_caller_takes_all_with_it() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        program = "import os, time\nos.write(3, b'x')\ntime.sleep(60)"
        with theirs:
            command = [sys.executable, "-c", STARTS, str(theirs.fileno()), program]
            caller = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        ours.settimeout(20)
        assert ours.recv(1) == b"x"
        caller.kill()
        caller.wait()
        assert ours.recv(1) == b""


@pytest.mark.parametrize("how", ["asked", "killed"])
def test_a_launcher_takes_all_with_it(how: str) -> None:
    """End the launcher politely, or as the kernel does when memory runs out, while a program of two processes runs."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            program = "import os, time\nos.fork()\nos.write(3, b'x')\ntime.sleep(60)"
            running = Running(program, kind="namespaces", limits=LIMITS, channel=theirs.fileno())
        ours.settimeout(20)
        assert ours.recv(1) == b"x"
        if how == "asked":
            running.stop()
            assert running.wait().stopped == "asked"
        else:
            os.kill(running.pid, signal.SIGKILL)
            with pytest.raises(SandboxFault, match="the launcher ended with -9"):
                running.wait()
        while ours.recv(1):
            pass
