"""The launcher: one process for each run, which makes the namespaces and enforces limits from outside them.

    python -s -S -E -c 'import sys; sys.path.insert(0, ROOT); from slime.sandbox.launcher import main; main()' CHANNEL

- Used by: `run`, which writes a request as JSON to our standard input, and reads a report from our standard output: a
  line of JSON, then the program's output and its errors as bytes. CHANNEL: a descriptor for the program, or nothing.
- Invariant: when we end, for whatever reason, nothing of the sandbox is left. Output, time and the end of process 1 are
  seen from here, where the program has no way to reach.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import tempfile
import time
from types import FrameType
from typing import Any

from slime.sandbox import kernel
from slime.sandbox.inside import OUTSIDE_USER, Setup, supervise
from slime.sandbox.view import USER


class _Asked(Exception):
    """The caller wants the run to end."""


def _ask(number: int, frame: FrameType | None) -> None:
    raise _Asked


def main() -> None:
    parent = os.getppid()
    kernel.die_with_parent()
    if os.getppid() != parent:
        os._exit(1)  # it died before we asked
    request: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    channel = int(sys.argv[1]) if len(sys.argv) > 1 else None
    with _scratch(request):
        try:
            report, output, errors = _run(request, channel)
        except OSError as error:
            report, output, errors = {"fault": str(error)}, b"", b""
    report |= {"output_bytes": len(output), "error_bytes": len(errors)}
    sys.stdout.buffer.write(json.dumps(report).encode() + b"\n" + output + errors)
    sys.stdout.buffer.flush()


@contextlib.contextmanager
def _scratch(request: dict[str, Any]):
    """Make the scratch directory of a run without namespaces; with them, it is a file system of its own."""
    if request["kind"] == "namespaces":
        yield
        return
    kernel.adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="slime-sandbox-", ignore_cleanup_errors=True) as directory:
        if os.getuid() == 0:
            os.chown(directory, OUTSIDE_USER, OUTSIDE_USER)
        request["scratch"] = directory
        yield


def _run(request: dict[str, Any], channel: int | None) -> tuple[dict[str, Any], bytes, bytes]:
    read_out, out = os.pipe()
    read_errors, errors = os.pipe()
    read_report, report = os.pipe()
    go, start = os.pipe()
    descriptors = {"stdin": _input(request), "stdout": out, "stderr": errors}
    if channel is not None:
        descriptors["channel"] = channel
    namespaces = request["kind"] == "namespaces"
    sys.stdout.flush()
    child = kernel.clone(kernel.ALL_NAMESPACES if namespaces else 0)
    if child == 0:
        for descriptor in (read_out, read_errors, read_report, start, 0, 1):
            os.close(descriptor)
        if os.read(go, 1) != b"g":
            os._exit(1)
        supervise(Setup(request, descriptors, report))
    for descriptor in (*descriptors.values(), report, go):
        os.close(descriptor)
    try:
        signal.signal(signal.SIGTERM, _ask)
        if namespaces:
            _map_users(child)
        os.write(start, b"g")
        stopped, texts = _collect(request["limits"], read_out, read_errors, read_report)
    except _Asked:
        stopped, texts = "asked", {read_out: b"", read_errors: b"", read_report: b""}
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not namespaces:
            _end_orphans()
    told: dict[str, Any] = json.loads(texts[read_report]) if texts[read_report] else {}
    if stopped is not None:
        told = {"code": None} | told | {"stopped": stopped}
    elif not told:
        told = {"fault": "process 1 of the sandbox has ended without a report"}
    return told, texts[read_out], texts[read_errors]


def _input(request: dict[str, Any]) -> int:
    """Return a descriptor from which the program can read its standard input, and that it cannot write to."""
    with tempfile.TemporaryFile() as file:
        file.write(request["stdin"].encode(errors="surrogateescape"))
        file.flush()
        return os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY)


def _map_users(child: int) -> None:
    """Give the child's namespace its users: the program's, and for process 1 that of root if we are root.

    Only root may map two users. Another user has one, so that process 1 and the program are the same user, and what
    keeps them apart is that the program has no capabilities and may not trace.
    """
    for kind, number in (("uid", os.geteuid()), ("gid", os.getegid())):
        text = f"{USER} {number} 1\n"
        if os.geteuid() == 0:
            text = f"0 0 1\n{USER} {OUTSIDE_USER} 1\n"
        elif kind == "gid":
            _write(f"/proc/{child}/setgroups", "deny")
        _write(f"/proc/{child}/{kind}_map", text)


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as error:
        raise OSError(error.errno, f"{path}: {error.strerror}") from error


def _collect(limits: dict[str, int], out: int, errors: int, report: int) -> tuple[str | None, dict[int, bytes]]:
    """Read until process 1 has reported, or a limit is passed; return that limit, and what was read."""
    texts = {out: bytearray(), errors: bytearray(), report: bytearray()}
    deadline = time.monotonic() + limits["wall_seconds"]
    waiting = set(texts)
    stopped = None
    while report in waiting and stopped is None:
        left = deadline - time.monotonic()
        if left <= 0:
            stopped = "wall"
            break
        stopped = _read_once(texts, waiting, left, limits["output_bytes"], (out, errors))
    # Process 1 has ended, or is about to: what is in the pipes is all that counts.
    while stopped is None and waiting and select.select(list(waiting), [], [], 0)[0]:
        stopped = _read_once(texts, waiting, 0, limits["output_bytes"], (out, errors))
    return stopped, {descriptor: bytes(text) for descriptor, text in texts.items()}


def _read_once(
    texts: dict[int, bytearray], waiting: set[int], seconds: float, most: int, counted: tuple[int, int]
) -> str | None:
    """Read what is there, waiting for at most `seconds`; return "output" if the program wrote more than `most`."""
    for descriptor in select.select(list(waiting), [], [], seconds)[0]:
        data = os.read(descriptor, 65536)
        if not data:
            waiting.discard(descriptor)
        texts[descriptor] += data
    if sum(len(texts[descriptor]) for descriptor in counted) > most:
        for descriptor in counted:
            del texts[descriptor][most:]
        return "output"
    return None


def _end_orphans() -> None:
    """Kill what is left of a run without namespaces, level by level: orphans become our children."""
    while children := _children():
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)


def _children() -> list[int]:
    found: list[int] = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended in the meantime
        if parent == os.getpid():
            found.append(int(name))
    return found
