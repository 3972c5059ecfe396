"""A process guard: runs one command, and ends it and everything that it started when the command's owner is gone.

    python -S -E process_guard.py LOG [directory=DIR] [keep=FD,FD] -- COMMAND...

- LOG: the file for the command's output; "-" is the guard's own standard error.
- DIR: a directory that is removed after the command has ended.
- FD: file descriptors that the command inherits.

The guard uses the standard library only and starts in about 20 ms. It prints the command's process id and exits with
the command's exit code.

- Used by: `engine.server_process` (engines and the router) and `rollout.reward_pool.process` (reward workers). The
  owner holds the other end of a pipe that is the guard's standard input.
- Invariant: when that pipe closes or the owner dies, the command's process group gets SIGTERM, and after a grace period
  SIGKILL; so does every descendant, even one that left the process group or the session. If the guard itself dies, the
  command dies with it. A byte on the pipe ends the command at once, without the grace period.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from types import FrameType

GUARD = (sys.executable, "-S", "-E", __file__)
"""The command that starts the guard."""
END_AT_ONCE = b"\n"
GRACE = 5.0
POLL = 0.5
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def _start(log: str, command: list[str], keep: list[int]) -> int:
    """Fork, and exec the command in a process group of its own; return its process id."""
    libc = ctypes.CDLL(None, use_errno=True)
    guard = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        # The kernel sends this signal when the forking thread ends. The guard has one thread: when the guard ends.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != guard:
            os._exit(1)
        output = 2 if log == "-" else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        for descriptor in range(3, 256):
            if descriptor not in keep:
                os.closerange(descriptor, descriptor + 1)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"cannot start {command[0]}: {error}\n".encode())
    os._exit(127)


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def _end(pid: int, grace: float) -> None:
    """Send SIGTERM to the group, wait up to `grace` seconds, and send SIGKILL to whatever is left."""
    if grace:
        _signal_group(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline:
        done, _ = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    _signal_group(pid, signal.SIGKILL)
    _end_orphans()


def _end_orphans() -> None:
    """Send SIGKILL to what the command left running, to its children and so on, and wait until they are gone.

    Orphans become the guard's children because it is a subreaper, so one level after the other turns up here.
    """
    while children := _children():
        for child in children:
            os.kill(child, signal.SIGKILL)  # safe: our child keeps its number until we wait for it
        for child in children:
            os.waitpid(child, 0)


def _children() -> list[int]:
    me = os.getpid()
    found: list[int] = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended in the meantime
        if parent == me:
            found.append(int(name))
    return found


def main() -> int:
    before, command = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    options = dict(word.split("=", 1) for word in before[1:])
    keep = [int(word) for word in options.get("keep", "").split(",") if word]
    try:
        return _watch(before[0], command, keep)
    finally:
        if "directory" in options:
            import shutil  # imported here because it takes as long as all other imports together

            shutil.rmtree(options["directory"], ignore_errors=True)


def _watch(log: str, command: list[str], keep: list[int]) -> int:
    """Run the command until it ends or must end; return the exit code."""
    parent = os.getppid()
    wake, wakeup = os.pipe()
    for end in (wake, wakeup):
        os.set_blocking(end, False)
    asked_to_end: list[int] = []
    signal.set_wakeup_fd(wakeup)

    def wake_up(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            asked_to_end.append(number)

    signal.signal(signal.SIGCHLD, wake_up)  # each signal writes a byte to `wakeup`
    signal.signal(signal.SIGTERM, wake_up)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # the command's orphans become our children
    pid = _start(log, command, keep)
    for descriptor in keep:
        os.close(descriptor)  # so that the owner notices when the command closes its end
    os.write(1, b"%d\n" % pid)
    while True:
        done, status = os.waitpid(-1, os.WNOHANG)
        if done and done != pid:
            continue  # an orphan of the command has ended
        if done:
            _signal_group(pid, signal.SIGKILL)  # whatever the command left running
            _end_orphans()
            return os.waitstatus_to_exitcode(status) & 0xFF
        ready, _, _ = select.select([0, wake], [], [], POLL)
        byte = os.read(0, 1) if 0 in ready else None
        # A forked child of the owner may keep the pipe open after the owner's death, so check the owner as well.
        if asked_to_end or os.getppid() != parent or byte is not None:
            _end(pid, 0.0 if byte else GRACE)
            return 0
        if wake in ready:
            os.read(wake, 512)


if __name__ == "__main__":
    sys.exit(main())
