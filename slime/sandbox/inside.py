"""Process 1 of the sandbox, which sets it up, starts the program, measures it and ends with it.

- Called by: `launcher`, in the child that it has made with new namespaces (or, with weaker isolation, without).
- Invariant: when process 1 of a process namespace ends, the kernel kills all others in it, however they hid. Process 1
  ends when the program ends, when the program is over a limit, and when the launcher dies.

The program is a child of process 1. It has an own session, no capabilities, no descriptors except 0, 1, 2 and perhaps
3 (its channel), a clean environment, and a filter of system calls.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
from typing import Any, NoReturn

from slime.sandbox import kernel, view
from slime.sandbox.system_calls import filter_program

CHANNEL = 3
"""The descriptor of the program's channel."""
OUTSIDE_USER = 65534
"""The user that the program is outside, if root has started it: nobody."""
_TICK = 0.02
"""Seconds between two measurements."""
_START = """\
import builtins, sys
builtins.exit = builtins.quit = sys.exit
with open({path!r}, encoding="utf-8", errors="surrogateescape") as file: code = file.read()
sys.argv[:] = [{path!r}]
del builtins, sys, file
exec(compile(code, {path!r}, "exec"))
"""
PROGRAM = "program.py"
_ORDER = ("stdin", "stdout", "stderr", "channel")


class Setup:
    """The descriptors and the request with which the launcher has made us."""

    def __init__(self, request: dict[str, Any], descriptors: dict[str, int], report: int) -> None:
        """`descriptors`: stdin, stdout, stderr, and perhaps channel. `report` takes our one line of JSON."""
        self.request = request
        self.limits: dict[str, int] = request["limits"]
        self.namespaces: bool = request["kind"] == "namespaces"
        self.descriptors, self.report = descriptors, report
        self.processes = -1
        self.scratch = view.SCRATCH
        self.as_root = os.getuid() == 0


def supervise(setup: Setup) -> NoReturn:
    """Set the sandbox up, run the program, report how it ended, and end."""
    try:
        report = _supervise(setup)
    except OSError as error:
        report = {"fault": str(error)}
    except Exception as error:  # noqa: BLE001 (nothing may leave this child except through its end)
        report = {"fault": f"{type(error).__name__}: {error}"}
    os.write(setup.report, json.dumps(report).encode())
    os._exit(0)


def _supervise(setup: Setup) -> dict[str, Any]:
    kernel.die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the kernel keeps only unhandled signals from process 1
    if setup.namespaces:
        setup.processes = view.build(setup.request["python_directory"], setup.limits["disk_bytes"])
    else:
        kernel.adopt_orphans()
        setup.scratch = setup.request["scratch"]
        setup.processes = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    _write_files(setup)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # `sigtimedwait` takes it
    broken, breaks = os.pipe()
    program = os.fork()
    if program == 0:
        _become_program(setup, breaks)
    os.close(breaks)
    for descriptor in setup.descriptors.values():
        os.close(descriptor)
    fault = os.read(broken, 4096)  # ends when the program starts, because the pipe closes then
    if fault:
        return {"fault": fault.decode()}
    kernel.hide_memory()
    return _watch(setup, program)


def _write_files(setup: Setup) -> None:
    """Write the program and its files into the scratch directory, as the program's own."""
    user = _user(setup)
    for name, text in setup.request["files"].items():
        folder, path = setup.scratch, os.path.join(setup.scratch, name)
        for part in name.split("/")[:-1]:
            folder = os.path.join(folder, part)
            if not os.path.isdir(folder):
                os.mkdir(folder)
                if setup.as_root:
                    os.chown(folder, user, user)
        with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
        if setup.as_root:
            os.chown(path, user, user)


def _user(setup: Setup) -> int:
    """Return the number of the program's user, as it is here."""
    return view.USER if setup.namespaces else OUTSIDE_USER


def _become_program(setup: Setup, breaks: int) -> NoReturn:
    """Give up everything, and execute the interpreter; `breaks` takes the reason if a step fails."""
    try:
        os.setsid()
        os.chdir(setup.scratch)
        given = setup.descriptors
        # First out of the way of the targets, then onto them; everything else is closed.
        sources = [fcntl.fcntl(given[name], fcntl.F_DUPFD_CLOEXEC, 50) for name in _ORDER if name in given]
        breaks = fcntl.fcntl(breaks, fcntl.F_DUPFD_CLOEXEC, 100)
        for target, source in enumerate(sources):
            os.dup2(source, target)
        os.closerange(len(sources), breaks)
        os.closerange(breaks + 1, os.sysconf("SC_OPEN_MAX"))
        _limit(setup)
        if setup.namespaces or setup.as_root:
            kernel.drop_capabilities_of_later_programs()
        if setup.as_root:
            os.setgroups([])
            os.setresgid(*[_user(setup)] * 3)
            os.setresuid(*[_user(setup)] * 3)
        kernel.drop_capabilities()
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        kernel.filter_system_calls(filter_program())
        python: str = setup.request["python"]
        start = _START.format(path=f"{setup.scratch}/{PROGRAM}")
        # The seed of hashes is fixed, so that a program ends in the same way each time. -S: no site-packages.
        environment = {
            "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1", "LANG": "C.UTF-8",
            "HOME": setup.scratch, "TMPDIR": setup.scratch, "PATH": "/usr/bin:/bin",
        }  # fmt: skip
        os.execve(python, [python, "-P", "-s", "-S", "-c", start], environment)
    except OSError as error:
        os.write(breaks, f"start the program: {error}".encode()[:4000])
    except Exception as error:  # noqa: BLE001 (as above)
        os.write(breaks, f"start the program: {type(error).__name__}: {error}".encode()[:4000])
    os._exit(127)


def _limit(setup: Setup) -> None:
    """Set the limits of the program and of each process that it starts."""
    limits = setup.limits
    # The kernel counts processes by user and user namespace: without a namespace, those that run already as well.
    others = 0 if setup.namespaces else _processes_of(OUTSIDE_USER if setup.as_root else os.getuid())
    values = {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_NPROC: limits["processes"] + others,
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_FSIZE: limits["disk_bytes"],
        resource.RLIMIT_STACK: 8 << 20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    for which, value in values.items():
        _, hard = resource.getrlimit(which)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # A second more of CPU, because the soft limit only sends a signal, which the program may ignore.
        over = value + 1 if which == resource.RLIMIT_CPU and hard == resource.RLIM_INFINITY else value
        resource.setrlimit(which, (value, over))


def _processes_of(user: int) -> int:
    """Return how many threads a user's processes have."""
    found = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == user:
                found += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue  # it has ended
    return found


def _watch(setup: Setup, program: int) -> dict[str, Any]:
    """Wait for the program, and stop everything if all processes together are over a limit."""
    peak = 0
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == program:
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            peak = max(peak, used.ru_maxrss * 1024)
            seconds = used.ru_utime + used.ru_stime
            code = os.waitstatus_to_exitcode(status)
            stopped = "cpu" if code == -signal.SIGXCPU or seconds > setup.limits["cpu_seconds"] else None
            return {"code": code, "stopped": stopped, "peak_bytes": peak, "cpu_seconds": seconds}
        if pid:
            continue  # an orphan, which is our child now
        memory, seconds = _measure(setup, program)
        peak = max(peak, memory)
        for name, value, limit in (("memory", memory, "memory_bytes"), ("cpu", seconds, "cpu_seconds")):
            if value > setup.limits[limit]:
                return {"code": None, "stopped": name, "peak_bytes": peak, "cpu_seconds": seconds}
        signal.sigtimedwait([signal.SIGCHLD], _TICK)


def _measure(setup: Setup, program: int) -> tuple[int, float]:
    """Return the bytes of memory and the CPU seconds of all processes in the sandbox except ourselves."""
    memory, done = 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = done.ru_utime + done.ru_stime
    for name in _all(setup, program):
        try:
            fields = _read(setup, f"{name}/stat").rpartition(b")")[2].split()
            resident = int(fields[21]) * resource.getpagesize()
        except OSError:
            continue  # it has ended
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        memory += resident
    if memory > setup.limits["memory_bytes"]:
        memory = sum(_share(setup, name) for name in _all(setup, program))
    return memory, seconds


def _all(setup: Setup, program: int) -> list[str]:
    """Return the process numbers in the sandbox; without namespaces only the program's, as others cannot be told."""
    if not setup.namespaces:
        return [str(program)]
    return [name for name in os.listdir(setup.processes) if name.isdigit() and name != "1"]


def _share(setup: Setup, name: str) -> int:
    """Return a process's part of the memory that it uses, where pages that n processes share count 1/n each."""
    try:
        lines = _read(setup, f"{name}/smaps_rollup").split(b"\n")
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(b"Pss:")), 0)
    except OSError:
        return 0  # it has ended


def _read(setup: Setup, path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY, dir_fd=setup.processes)
    try:
        return os.read(descriptor, 8192)
    finally:
        os.close(descriptor)
