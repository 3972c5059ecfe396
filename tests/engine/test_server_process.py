from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slime.config.args import Args
from slime.core.process_guard import GUARD
from slime.engine.launch import launch_engine, launch_router
from slime.engine.server_process import PORT_TRIES, ManagedProcess, find_free_port, start_at_free_port

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:1"
# A child with a child of its own, which ignores SIGTERM.
FAMILY = (
    "import subprocess, sys, time;"
    "p = subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(15, signal.SIG_IGN);"
    " print(1, flush=True); time.sleep(600)'], stdout=subprocess.PIPE);"
    "p.stdout.readline(); print('grandchild', p.pid, flush=True); time.sleep(600)"
)
# A parent that starts the family under the guard; a fork of it holds the guard's pipe open for longer than it lives.
PARENT = f"""
import os, sys, time
from slime.engine.server_process import ManagedProcess
process = ManagedProcess("family", [sys.executable, "-c", {FAMILY!r}], url={NOWHERE!r}, log_path=sys.argv[1])
fork = os.fork() if sys.argv[2] == "fork" else 1
if fork == 0:
    time.sleep(30)
    os._exit(0)
print(process.pid, fork, flush=True)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it ends while its file is read
        return False


def wait_for(condition: object, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # pyright: ignore[reportCallIssue]
            return True
        time.sleep(0.02)
    return False


def grandchild(log: Path) -> int:
    assert wait_for(lambda: log.is_file() and "grandchild" in log.read_text())
    return int(log.read_text().split()[1])


@pytest.mark.parametrize("pipe", ["plain", "fork"])
def test_nothing_outlives_a_parent_that_is_killed(tmp_path: Path, pipe: str) -> None:
    log = tmp_path / "log"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(log), pipe],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert parent.stdout is not None
    child, fork = map(int, parent.stdout.readline().split())
    grand = grandchild(log)
    assert is_running(child)
    assert is_running(grand)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert wait_for(lambda: not is_running(child) and not is_running(grand))
    if pipe == "fork":
        os.kill(fork, signal.SIGKILL)


def test_stop_ends_all_descendants_but_not_before(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = ManagedProcess("family", [sys.executable, "-c", FAMILY], url=NOWHERE, log_path=log)
    grand = grandchild(log)
    time.sleep(1.0)
    assert process.alive()
    assert is_running(grand)  # the control
    process.stop()
    assert not process.alive()
    assert wait_for(lambda: not is_running(process.pid) and not is_running(grand))
    process.stop()


def test_the_command_dies_with_its_guard(tmp_path: Path) -> None:
    process = ManagedProcess(
        "sleeper",
        [sys.executable, "-c", "import time; time.sleep(600)"],
        url="http://127.0.0.1:1",
        log_path=tmp_path / "log",
    )
    process._guard.kill()
    assert wait_for(lambda: not is_running(process.pid))


@pytest.mark.parametrize("ending", ["stopped", "ends itself"])
def test_a_descendant_outside_the_group_ends_too(tmp_path: Path, ending: str) -> None:
    """A compiler's worker or a scheduler may start a session of its own."""
    script = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep({600 if ending == "stopped" else 0})
"""
    process = ManagedProcess("engine 9", [sys.executable, "-c", script], url=NOWHERE, log_path=tmp_path / "log")
    pid = tmp_path / "pid"
    assert wait_for(lambda: pid.is_file() and pid.read_text() != "")
    if ending == "stopped":
        process.stop()
        assert not is_running(int(pid.read_text())), "stop returns once it is gone"
    assert wait_for(lambda: not is_running(int(pid.read_text())))


def test_an_earlier_runs_log_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("ready\n")
    script = "import time; print('loading', flush=True); time.sleep(600)"
    phases = (("loading", "loading weights"), ("ready", "ready"))
    process = ManagedProcess(
        "engine 8", [sys.executable, "-c", script], url=NOWHERE, log_path=tmp_path / "log", phases=phases
    )
    assert wait_for(lambda: process.phase() == "loading weights")
    with pytest.raises(RuntimeError, match=r"within 0\.1 s, it was loading weights"):
        process.wait_ready(0.1)
    process.stop()


def test_a_failed_start_shows_the_log(tmp_path: Path) -> None:
    script = "import sys; print('no such thing: 42'); sys.exit(3)"
    process = ManagedProcess("engine 5", [sys.executable, "-c", script], url=NOWHERE, log_path=tmp_path / "log")
    with pytest.raises(RuntimeError, match=r"(?s)engine 5 ended while starting \(exit code 3\).*no such thing: 42"):
        process.wait_ready(30)


def test_a_process_that_is_never_ready_fails(tmp_path: Path) -> None:
    process = ManagedProcess(
        "engine 6",
        [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)"],
        url=f"http://127.0.0.1:{find_free_port()}",
        log_path=tmp_path / "log",
    )
    assert wait_for(lambda: (tmp_path / "log").is_file() and "loading" in (tmp_path / "log").read_text())
    with pytest.raises(RuntimeError, match=r"(?s)engine 6 was not ready.*within 0\.3 s.*loading"):
        process.wait_ready(0.3)
    process.stop()


def test_a_command_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    process = ManagedProcess("engine 7", ["/no/such/program"], url=NOWHERE, log_path=tmp_path / "log")
    with pytest.raises(RuntimeError, match=r"(?s)exit code 127.*cannot start /no/such/program"):
        process.wait_ready(30)


def test_the_guard_loads_little() -> None:
    """It starts once for each engine and reward worker, so it has to start fast."""
    command = [GUARD[0], "-X", "importtime", *GUARD[1:], "-", "--", "/bin/true"]
    report = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stderr
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in report.splitlines()[1:]}
    assert "ctypes" in loaded, "control: the report has what the guard imports"
    assert loaded <= sys.stdlib_module_names
    assert not loaded & {"asyncio", "subprocess", "logging", "json", "typing", "pathlib"}, "of what slows a start"


def test_a_taken_port_is_left_for_another(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    """Another run's router is at the port by the time the server binds it, and answers that it is healthy."""
    args = Args(num_rollout=1, rollout_engine="embedded", hf_checkpoint=str(model_dirs["glm4"]))
    other = start_at_free_port(
        lambda port: launch_router(args, host="127.0.0.1", port=port, log_path=tmp_path / "other"),
        port=find_free_port,
        timeout=60,
        keep=lambda process: None,
    )
    taken = int(other.url.rpartition(":")[2])

    def router(port: int) -> ManagedProcess:
        return launch_router(args, host="127.0.0.1", port=port, log_path=tmp_path / "router")

    def engine(port: int) -> ManagedProcess:
        return launch_engine(args, index=0, host="127.0.0.1", port=port, log_path=tmp_path / "engine")

    try:
        for launch in (router, engine):
            free = find_free_port()
            ports, started = iter([taken, free]), list[ManagedProcess]()
            process = start_at_free_port(launch, port=lambda ports=ports: next(ports), timeout=60, keep=started.append)
            assert process is started[1] and process.url.endswith(f":{free}")
            assert not started[0].alive() and process.alive()
            process.stop()
        tries: list[ManagedProcess] = []
        with pytest.raises(RuntimeError, match=r"(?s)ended while starting .*ddress already in use"):
            start_at_free_port(router, port=lambda: taken, timeout=60, keep=tries.append)
        assert len(tries) == PORT_TRIES and not any(one.alive() for one in tries)
    finally:
        other.stop()
