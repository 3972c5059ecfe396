"""A stopped process is named with its pid, also if a child process has started it."""

from __future__ import annotations

import signal
import subprocess
import time

import psutil

from slime.cluster.life.stopped import stopped_below


def test_only_the_stopped_process_is_named() -> None:
    shell = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    assert shell.stdout is not None
    sleeper = psutil.Process(int(shell.stdout.readline()))
    try:
        me = psutil.Process()
        assert f"pid {sleeper.pid}" not in stopped_below(me), "control"
        sleeper.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 30
        while sleeper.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
            time.sleep(0.01)
        assert f"sleep, pid {sleeper.pid}" in stopped_below(me)
        assert f"pid {shell.pid}" not in stopped_below(me), "its parent goes on"
    finally:
        sleeper.kill()
        shell.kill()
        shell.wait()
