"""Calls of the Linux kernel that Python's standard library lacks, through ctypes.

- Used by: `launcher`, `inside`, `view`, in processes that import nothing heavy.
- Invariant: a call that fails raises an OSError that names the call and what it was for.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
ALL_NAMESPACES = (
    CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET
)

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 1, 2, 4, 8
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_SECUREBITS, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 28, 36, 38
_SECCOMP_MODE_FILTER = 2
_SECURE_BITS = 0b1110_1111
"""NOROOT, NO_SETUID_FIXUP, KEEP_CAPS off and NO_CAP_AMBIENT_RAISE, each locked."""

NUMBERS = {
    "x86_64": {"clone": 56, "pivot_root": 155, "capset": 126, "mount_setattr": 442},
    "aarch64": {"clone": 220, "pivot_root": 41, "capset": 91, "mount_setattr": 442},
}
"""The system calls without a wrapper in every libc."""

# PyDLL keeps the interpreter's lock during a call: a clone that released it would come back twice, and lock it twice.
_libc = ctypes.PyDLL(None, use_errno=True)


def _number(name: str) -> int:
    numbers = NUMBERS.get(platform.machine())
    if numbers is None:
        raise OSError(f"the sandbox does not know the system calls of {platform.machine()}")
    return numbers[name]


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def clone(flags: int) -> int:
    """Fork with new namespaces; return the child's process id, and 0 in the child, as `os.fork` does."""
    zero = ctypes.c_long(0)
    arguments = (ctypes.c_long(_number("clone")), ctypes.c_long(flags | signal.SIGCHLD), zero, zero, zero, zero)
    return _checked(_libc.syscall(*arguments), "make new user, mount, process and network namespaces")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Call mount(2)."""
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    result = _libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    _checked(result, f"mount {kind or source} on {target}")


def detach(target: str) -> None:
    """Unmount what is mounted on `target`, and forget it as soon as nobody uses it."""
    _checked(_libc.umount2(os.fsencode(target), MNT_DETACH), f"unmount {target}")


def restrict_mount(target: str, attributes: int, *, recursive: bool) -> None:
    """Set attributes of a mount, or of all mounts below it as well (Linux 5.12)."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    result = _libc.syscall(
        ctypes.c_long(_number("mount_setattr")), ctypes.c_long(_AT_FDCWD), os.fsencode(target),
        ctypes.c_long(_AT_RECURSIVE if recursive else 0), ctypes.byref(wanted), ctypes.c_long(ctypes.sizeof(wanted)),
    )  # fmt: skip
    _checked(result, f"make the mount {target} read-only")


def become_root(directory: str) -> None:
    """Make `directory`, a mount, the root of all paths, and lose the old root."""
    os.chdir(directory)
    _checked(_libc.syscall(ctypes.c_long(_number("pivot_root")), b".", b"."), "pivot_root")
    detach(".")  # the old root lies on top of the new one now
    os.chdir("/")


def _prctl(option: int, value: int, what: str) -> None:
    zero = ctypes.c_ulong(0)
    _checked(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero), what)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that made it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, "die with the parent")


def adopt_orphans() -> None:
    """Become the parent of the orphans among our descendants."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, "adopt orphans")


def hide_memory() -> None:
    """Let no process of our own user trace us or read our memory."""
    _prctl(_PR_SET_DUMPABLE, 0, "hide memory")


def drop_capabilities_of_later_programs() -> None:
    """Empty the bounding set, so that no program that we execute gains a capability."""
    for capability in range(64):
        try:
            _prctl(_PR_CAPBSET_DROP, capability, f"drop capability {capability}")
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break  # the first number that this kernel does not know
    _prctl(_PR_SET_SECUREBITS, _SECURE_BITS, "lock the secure bits")


def drop_capabilities() -> None:
    """Give up every capability that this process has."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    result = _libc.syscall(ctypes.c_long(_number("capset")), ctypes.byref(header), ctypes.byref(nothing))
    _checked(result, "drop the capabilities")


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def filter_system_calls(instructions: bytes) -> None:
    """Give up new privileges, and let the kernel judge each later system call by a BPF program (8 bytes a step)."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "give up new privileges")
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    program = _Program(len(instructions) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    zero = ctypes.c_ulong(0)
    result = _libc.prctl(
        ctypes.c_int(_PR_SET_SECCOMP), ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(program), zero, zero
    )
    _checked(result, "filter system calls")
