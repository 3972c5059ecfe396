"""Ends a local Ray's own processes when the driver that started them is gone without a word (SIGKILL).

Path: `placement.start_ray` starts one beside a local Ray. Most of Ray notices by itself; its agents first try to
report to a control store that has died as well, for up to a minute. Invariant: only the processes named on the command
line are ended, each by pid and start time.

    python -m slime.cluster.reaper PID:CREATED ...      (its standard input is the driver's; end of file is its death)
"""

from __future__ import annotations

import subprocess
import sys

import psutil


def watch() -> subprocess.Popen[bytes]:
    """Start a reaper for all present descendants of this process; closing its standard input lets it act and end."""
    owned = [f"{child.pid}:{child.create_time()}" for child in psutil.Process().children(recursive=True)]
    command = [sys.executable, "-m", "slime.cluster.reaper", *owned]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def main() -> None:
    owned: list[psutil.Process] = []
    for word in sys.argv[1:]:
        pid, created = word.split(":")
        if psutil.pid_exists(int(pid)):
            process = psutil.Process(int(pid))
            if process.create_time() == float(created):
                owned.append(process)
    sys.stdin.buffer.read()
    for process in owned:
        if process.is_running():  # psutil compares the start time, so a reused pid is left alone
            process.kill()


if __name__ == "__main__":
    main()
