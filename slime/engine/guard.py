"""Runs one command, and sees to it that the command does not outlive whoever asked for it.

    python -S -E guard.py LOG -- COMMAND...        (standard library only: it starts in ~20 ms)

Path: `launch.ManagedProcess` starts it with a pipe as standard input. Invariant: when that pipe closes, however
the other side ended, the command's whole process group gets SIGTERM, and SIGKILL a grace later, with every descendant
that has left the group. The command dies with the guard too. Prints the command's process id; exits with its code.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time

GRACE = 5.0
POLL = 0.5
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def _start(log: str, command: list[str]) -> int:
    """Fork and exec in a process group of its own -> process id."""
    libc = ctypes.CDLL(None, use_errno=True)
    guard = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        # Tied to the forking thread; the guard has only one, so here that means the guard.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != guard:
            os._exit(1)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.closerange(3, 256)
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


def _end(pid: int) -> None:
    """SIGTERM to the group, SIGKILL to what is left of it."""
    _signal_group(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        done, _ = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    _signal_group(pid, signal.SIGKILL)
    _end_orphans()


def _end_orphans() -> None:
    """SIGKILL to what the command left behind, its children, theirs; wait until they are gone."""
    while children := _children():
        for child in children:
            os.kill(child, signal.SIGKILL)  # ours, and not waited for yet: nobody else can have the number
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
            continue  # has ended meanwhile
        if parent == me:
            found.append(int(name))
    return found


def main() -> int:
    log, command = sys.argv[1], sys.argv[3:]
    parent = os.getppid()
    wake, wakeup = os.pipe()
    for end in (wake, wakeup):
        os.set_blocking(end, False)
    asked_to_end: list[int] = []
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: asked_to_end.append(1))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of the command become ours
    pid = _start(log, command)
    print(pid, flush=True)
    while True:
        done, status = os.waitpid(-1, os.WNOHANG)
        if done and done != pid:
            continue  # an orphan of the command's, ended
        if done:
            _signal_group(pid, signal.SIGKILL)  # what the command itself left behind
            _end_orphans()
            return os.waitstatus_to_exitcode(status) & 0xFF
        ready, _, _ = select.select([0, wake], [], [], POLL)
        # A forked child of the parent may hold the pipe open beyond the parent's death: the parent is asked for, too.
        if asked_to_end or os.getppid() != parent or (0 in ready and not os.read(0, 1)):
            _end(pid)
            return 0
        if wake in ready:
            os.read(wake, 512)


if __name__ == "__main__":
    sys.exit(main())
