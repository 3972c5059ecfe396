"""A program in the sandbox: what it is given, what is returned, which limit ends it, and where it is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slime.sandbox.run import Ended, Limits, Outcome, SandboxFault, refusal, run
from slime.sandbox.system_calls import filter_program

ROOT = Path(__file__).parents[2]
HERE = pytest.mark.skipif(refusal("namespaces") is not None, reason="this kernel gives us no namespaces")


@HERE
def test_a_program_gets_input_and_files() -> None:
    program = (
        "import os, sys\nprint(sys.stdin.read()[::-1], open('a/b.txt').read(), sorted(os.environ), os.listdir('/'))\n"
        "print(os.getuid(), os.getcwd(), [bool(os.statvfs(path).f_flag & 1) for path in ('/', os.__file__, '.')])\n"
        "print('é', file=sys.stderr)\nexit(3)"
    )
    ended = run(program, stdin="olleh", files={"a/b.txt": "text"})
    lines = ended.stdout.decode().splitlines()
    assert lines[0].startswith("hello text ['HOME', 'LANG', 'PATH', 'PYTHONDONTWRITEBYTECODE',")
    assert not {"'home'", "'proc'", "'sys'", "'run'"} & set(lines[0].split(", "))
    assert lines[1] == "1000 /scratch [True, True, False]", "only the scratch directory can be written"
    assert (ended.code, ended.stderr, ended.outcome) == (3, "é\n".encode(), Outcome.CRASH)
    assert run("pass").outcome is None, "control"
    for path in ("/etc/x", "../x", "a/../../x"):
        with pytest.raises(ValueError, match="is not in the scratch directory"):
            run("", files={path: ""})


@HERE
def test_hashes_are_the_same_each_time() -> None:
    texts = {run("print(list({'a', 'b', 'c', 'd', 'e', 'f'}), hash('a'))").stdout for _ in range(3)}
    assert len(texts) == 1


@HERE
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "import os\nfor _ in range(3): os.fork()\nwhile True: pass",
    ],
    ids=["loop", "ignored", "processes"],
)
def test_cpu_time_is_limited(program: str) -> None:
    ended = run(program, limits=Limits(cpu_seconds=1, wall_seconds=60))
    assert (ended.outcome, ended.stopped) == (Outcome.TIMEOUT, "cpu")
    assert ended.cpu_seconds < 4


def test_outcomes_follow_from_how_it_ended() -> None:
    def outcome(code: int | None, stopped: str | None = None, stderr: bytes = b"") -> Outcome | None:
        return Ended(code=code, stopped=stopped, stdout=b"", stderr=stderr).outcome

    assert [outcome(0), outcome(1), outcome(-11)] == [None, Outcome.CRASH, Outcome.CRASH]
    assert [outcome(-31), outcome(None, "output")] == [Outcome.REFUSED] * 2
    assert [outcome(None, "wall"), outcome(None, "cpu"), outcome(-24, "cpu")] == [Outcome.TIMEOUT] * 3
    assert [outcome(None, "memory"), outcome(1, None, b"x\nMemoryError\n")] == [Outcome.MEMORY] * 2
    assert outcome(0, None, b"MemoryError") is None, "a program may write what it likes"


def test_a_broken_sandbox_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "base_prefix", "/dev/null")
    with pytest.raises(SandboxFault):
        run("print(1)")


def test_unknown_machines_have_no_filter() -> None:
    with pytest.raises(OSError, match="no filter of system calls for riscv64"):
        filter_program("riscv64")
    for machine in ("x86_64", "aarch64"):
        steps = filter_program(machine)
        assert len(steps) % 8 == 0 and steps[-8:] == bytes.fromhex("060000000000ff7f"), "allow"


@HERE
@pytest.mark.skipif(shutil.which("unshare") is None, reason="util-linux")
def test_a_kernel_without_namespaces_is_refused() -> None:
    """A user namespace has its own limit of namespaces, which is 0 here."""
    code = (
        "from slime.config.args import Args\nfrom slime.config.parse import UsageError\n"
        "from slime.cluster.main import check_sandbox\n"
        "check_sandbox(Args(rm_type='math'))\n"
        "try: check_sandbox(Args(rm_type='code'))\nexcept UsageError as error: print(error)\n"
    )
    shell = f'echo 0 > /proc/sys/user/max_user_namespaces && exec {sys.executable} -c "$CODE"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", shell], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "CODE": code},
    )  # fmt: skip
    assert "--sandbox namespaces: code that the model writes cannot be isolated here: [Errno 28] make new user," in (
        done.stdout
    ), done.stderr
    assert "or accept weaker isolation with --sandbox rlimits" in done.stdout


AS_NOBODY = """
import os
from slime.sandbox.run import Limits, Running, run, refusal
for kind in ("namespaces", "rlimits"):
    assert refusal(kind) is None, (kind, refusal(kind))
    def outcome(program, **limits):
        return str(run(program, kind=kind, limits=Limits(wall_seconds=10, **limits)).outcome)
    print(kind, outcome("print(1)"), outcome("import socket; socket.socket()"), outcome("x = bytearray(1 << 30)"),
          outcome("print('x' * (1 << 22))"), outcome("while 1: pass", cpu_seconds=1),
          outcome("kept = [open('/dev/null') for _ in range(200)]"),
          outcome("import ctypes; ctypes.CDLL(None).ptrace()"),
          outcome("import os; os.mkdir('/x')"), outcome("import os; print(os.environ['SECRET'])"),
          outcome("import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))"),
          outcome("import resource; resource.prlimit(0, resource.RLIMIT_CPU)"))
for kind in ("namespaces", "rlimits"):
    ours, theirs = os.pipe()
    daemon = "import os, time\\nif os.fork() == 0:\\n  os.setsid()\\n  if os.fork(): os._exit(0)\\n  time.sleep(60)\\n"
    running = Running(daemon, kind=kind, limits=Limits(), channel=theirs)
    os.close(theirs)
    running.wait()
    print(kind, os.read(ours, 1))
"""


@pytest.mark.skipif(os.getuid() != 0 or not Path("/usr/bin/python3").exists(), reason="needs root, to be nobody")
def test_ordinary_users_and_weaker_isolation(tmp_path: Path) -> None:
    """Run as nobody with the system's Python: both kinds of isolation work without root."""
    version = subprocess.run(
        ["/usr/bin/python3", "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True
    )
    readable = subprocess.run(["/usr/bin/python3", "-c", "import slime.sandbox"], user=65534, group=65534, cwd=ROOT)
    if version.stdout != b"True\n" or readable.returncode:
        pytest.skip("nobody cannot run this copy of slime")
    done = subprocess.run(
        ["/usr/bin/python3", "-B", "-c", AS_NOBODY], user=65534, group=65534, extra_groups=[], cwd="/", text=True,
        capture_output=True, env={"PYTHONPATH": str(ROOT), "SECRET": "x"},
    )  # fmt: skip
    expected = "None refused memory refused timeout crash refused crash crash crash None"
    assert done.stdout.splitlines() == [
        f"namespaces {expected}", f"rlimits {expected}", "namespaces b''", "rlimits b''",
    ], done.stderr  # fmt: skip
