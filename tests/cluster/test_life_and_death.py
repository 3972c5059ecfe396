"""Processes: what a run starts ends with it, however it ends; wrong input is an error before anything starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from slime.engine.server_process import find_free_port
from slime.observability.path_lock import PathLocks
from tests.cluster.attacks import (
    PLANTED,
    as_nobody,
    authorization,
    judged,
    leaks,
    own_control_key,
    port_of,
    ray_session,
    statuses,
)
from tests.cluster.hooks_for_tests import DAEMON
from tests.cluster.runs import (
    ROOT,
    RUN_TIMEOUT_S,
    SMALL,
    Task,
    environment,
    events,
    family,
    flags,
    marked,
    start,
    wait_for,
)
from tests.cluster.sockets import ALWAYS, Socket, faults, listening, unprotected

pytestmark = pytest.mark.timeout(900)


@contextmanager
def running(task: Task, tmp_path: Path, *extra: str) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """A run that has trained one step and continues, with all its processes; none is left for the next tests."""
    save = tmp_path / "run"
    small = ["--num-rollout", "100000", *SMALL, *extra]
    small += ["--custom-rollout-log-function-path", "tests.cluster.hooks_for_tests.leave_a_daemon"]
    process = start(flags(task, save, *small), tmp_path / "log.txt")
    metrics = save / "metrics.jsonl"
    everyone: list[psutil.Process] = []
    try:
        wait_for(
            lambda: process.poll() is not None or (metrics.exists() and metrics.stat().st_size > 0), "the first step"
        )
        assert process.poll() is None, (tmp_path / "log.txt").read_text()[-4000:]
        everyone = family(process.pid)
        names = " ".join(" ".join(p.cmdline()) for p in everyone)
        assert "sglang_router" in names
        assert "slime.engine.embedded.server" in names
        yield process, everyone
    finally:
        if process.poll() is None:
            everyone = [*everyone, *family(process.pid)]
        for one in everyone:
            with suppress(psutil.NoSuchProcess):
                one.kill()


def assert_protected(everyone: list[psutil.Process]) -> None:
    """No part of the job can be reached from other machines, and Ray requires the job's own token."""
    sockets = listening(everyone)
    assert {socket.role for socket in sockets} >= ALWAYS
    assert faults(sockets) == []
    [server] = [process for process in everyone if process.name() == "gcs_server"]
    assert unprotected(sockets, server.environ()["RAY_AUTH_TOKEN"]) == []
    some = [socket for socket in sockets if socket.role == "Ray's gcs_server"]
    assert len(unprotected(some, "1" * 64)) == 1, "control: a token that is none"
    beyond = [Socket("router", "0.0.0.0", 1), Socket("engine", "::", 2), Socket("nc -l 3", "127.0.0.1", 3)]
    assert len(faults(beyond)) == 3, "control"


def assert_closed_to_others(everyone: list[psutil.Process]) -> None:
    """Another user of the machine gets nothing from engine and router; a client with their keys does."""
    sockets = listening(everyone)
    for asked, answers in as_nobody(sockets).items():
        assert set(answers.values()) == {401}, (asked, answers)
    own = own_control_key(everyone)
    assert own not in PLANTED.values(), "the run has a key of its own next to the user's"
    for role, key, asked, status in (
        ("engine", PLANTED["engine"], "POST /generate", 200),
        ("engine", PLANTED["engine"], "GET /server_info", 200),
        ("router", PLANTED["router"], "POST /generate", 200),
        ("router", PLANTED["router"], "GET /workers", 401),
        ("router", PLANTED["control"], "GET /workers", 200),
        ("router", own, "GET /workers", 200),
    ):
        assert statuses(port_of(sockets, role), role, key, only=asked) == {asked: status}, (role, asked)


def assert_hidden(everyone: list[psutil.Process], tmp_path: Path, requests: list[tuple[str, str | None]]) -> None:
    """Secrets in flags reach the programs that need them, and are in no file of the run and on no command line."""
    path, header = requests[0]
    assert path == f"/judge?token={PLANTED['token']}"
    assert header == authorization()
    [server] = [process for process in everyone if process.name() == "gcs_server"]
    own = {"token": server.environ()["RAY_AUTH_TOKEN"], "own key": own_control_key(everyone)}
    assert leaks(everyone, [tmp_path, ray_session(server)], {**PLANTED, **own}) == []
    log = (tmp_path / "run" / "logs" / "rollout.log").read_text()
    assert "no reward for /judge?token=***" in log, "control: the judge's refusals are logged"
    assert "rm_url is not written here" in (tmp_path / "run" / "args.yaml").read_text()
    (tmp_path / "planted").write_text(PLANTED["token"])
    assert len(leaks([], [tmp_path])) == 1, "control"


def assert_all_gone(everyone: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(everyone, timeout=RUN_TIMEOUT_S)
    alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert alive == []


def test_a_terminated_job_leaves_nothing(
    task: Task, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`timeout` signals the whole process group. A hook has left a daemon.

    The job is attacked meanwhile, and continues. (Ctrl-C: see `test_async`; SIGKILL: see tests/kill.)
    """
    marker = new_marker()
    monkeypatch.setenv(marker, "1")
    with judged() as (secret_flags, requests), running(task, tmp_path, *secret_flags) as (process, everyone):
        daemons = [one for one in marked(marker) if one.cmdline() == ["sleep", "86399"]]
        assert [one.pid for one in daemons] == [int((tmp_path / "run" / DAEMON).read_text())], "control"
        assert any(path.name == "ray" for path in temporary.iterdir()), "control"
        assert_protected(everyone)
        assert_closed_to_others(everyone)
        assert_hidden(everyone, tmp_path, requests)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=RUN_TIMEOUT_S) == 128 + signal.SIGTERM
        assert_all_gone([*everyone, *daemons])
        ended = (tmp_path / "log.txt").read_text().rpartition("SIGTERM has ended the run; ")[2]
        assert f" is saved in {tmp_path}/run/iter_" in ended or f"last checkpoint is {tmp_path}/run/iter_" in ended
        assert PLANTED["token"] not in ended
    assert_no_trace(marker, temporary, tmp_path / "run")


def assert_no_trace(marker: str, temporary: Path, save: Path) -> None:
    """A run that was started with the variable `marker` and this directory for temporary files has left neither."""
    wait_for(lambda: marked(marker) == [], "the end of the reaper")
    assert [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")] == []
    assert any((save / "logs" / "ray").rglob("raylet.out")), "what Ray has written is kept"


def new_marker() -> str:
    return f"SLIME_TEST_RUN_{os.getpid()}_{time.monotonic_ns()}"


@contextmanager
def temporary_files(patch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give runs a directory for temporary files; its name is short, because Ray's sockets include it in theirs."""
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as directory:
        patch.setenv("TMPDIR", directory)
        yield Path(directory)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with temporary_files(monkeypatch) as directory:
        yield directory


def submit(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Submit a job and follow it; a new cluster has no agent for the first seconds or minutes."""
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while True:
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
        if "No available agent" not in result.stderr or time.monotonic() > deadline:
            return result
        time.sleep(1)


def test_ray_job_submit_runs_two_rollouts(task: Task, tmp_path: Path) -> None:
    marker = new_marker()
    env = {**environment(), marker: "1", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(tmp_path)}
    ray = Path(sys.executable).parent / "ray"
    port = str(find_free_port())
    head = [str(ray), "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", "0"]
    head += ["--dashboard-host", "127.0.0.1", "--dashboard-port", port, "--temp-dir", f"/tmp/ray_{os.getpid()}"]
    # Ray's default is a fixed port of the machine, which the Ray of a test that runs at the same time may have.
    head += ["--dashboard-agent-listen-port", str(find_free_port())]
    save = tmp_path / "run"
    with (tmp_path / "head.txt").open("wb") as log:
        cluster = subprocess.Popen(head, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        arguments = flags(task, save, *SMALL, "--num-rollout", "2")
        job = [sys.executable, f"{ROOT}/train.py", *arguments]
        command = [str(ray), "job", "submit", "--address", address, "--", *job]
        wait_for(lambda: "Ray runtime started" in (tmp_path / "head.txt").read_text(), "ray start")
        result = submit(command, env)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        assert sorted(events(save, "rollout/reward")) == [1, 2]
        (package := tmp_path / "package").mkdir()
        (package / "own_hook.py").touch()
        relative = [*job[:2], *flags(task, Path("out"), "--num-rollout", "2")]
        refused = submit([*command[: command.index("--")], "--working-dir", str(package), "--", *relative], env)
        assert refused.returncode != 0
        assert "--save out: a job's own folder is Ray's temporary copy of --working-dir" in refused.stdout
        left = [p for p in marked(marker) if "slime" in " ".join(p.cmdline())]
        assert left == [], "the job's own processes have ended, Ray's run on"
        assert cluster.poll() is None
    finally:
        cluster.send_signal(signal.SIGTERM)
        cluster.wait(timeout=RUN_TIMEOUT_S)
        for process in marked(marker):
            process.kill()


def bad_line(tmp_path: Path) -> str:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": [{"role": "user", "content": "1+1"}], "label": "2"}) + "\n{not json\n")
    return str(path)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--rolout-batch-size", "4"], "--rollout-batch-size"),
        (["--rollout-temperature", "warm"], "--rollout-temperature"),
        (["--num-steps-per-rollout", "2", "--global-batch-size", "4"], "--global-batch-size"),
        (["--hf-checkpoint", "/nowhere"], "/nowhere"),
        (["--prompt-data", "BAD_LINE"], "bad.jsonl:2"),
    ],
)
def test_bad_input_is_one_error_before_any_process(task: Task, tmp_path: Path, extra: list[str], expected: str) -> None:
    extra = [bad_line(tmp_path) if value == "BAD_LINE" else value for value in extra]
    arguments = flags(task, tmp_path / "run", *extra)
    result = subprocess.run(
        [sys.executable, ROOT / "train.py", *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert result.returncode != 0
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists(), "nothing was started, so nothing was written"


def test_a_second_run_with_the_save_fails(task: Task, tmp_path: Path) -> None:
    """The second run has another log directory; the first run is this process."""
    save = tmp_path / "run"
    arguments = flags(task, save, "--log-dir", str(tmp_path / "logs"))
    with PathLocks([save]):
        result = subprocess.run(
            [sys.executable, ROOT / "train.py", *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True
        )
    assert result.returncode == 1
    assert (
        result.stderr.startswith(f"\n{save}: in use by process {os.getpid()} on ") and "Traceback" not in result.stderr
    )
