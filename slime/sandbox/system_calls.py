"""The filter of system calls: a program in the sandbox is killed, or gets an error, when it asks for one of these.

- Used by: `inside`, just before the program starts. The filter stays with it and with all that it starts.
- Invariant: whatever the namespaces do not separate (sockets of virtual machines, keys, memory files that no limit
  counts), and whatever could change the sandbox (mounts, namespaces, tracing), is in one of the two tables.

The kernel runs the filter before each system call. It is a BPF program: each step has 8 bytes, and a jump counts steps.
"""

from __future__ import annotations

import errno
import platform
import struct

KILLED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "mount_setattr": (442, 442), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "unshare": (272, 97), "setns": (308, 268),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "bpf": (321, 280),
    "perf_event_open": (298, 241), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262), "quotactl": (179, 60), "quotactl_fd": (443, 443), "acct": (163, 89),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "syslog": (103, 116), "vhangup": (153, 58),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None),
}  # fmt: skip
"""A program that makes one of these calls is killed with SIGSYS. Numbers: x86-64, 64-bit ARM."""

DENIED = {
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "personality": (135, 92),
    "mknod": (133, None), "mknodat": (259, 33), "lookup_dcookie": (212, 18),
}  # fmt: skip
"""These calls fail with EPERM: programs try some of them without harm in mind."""

_SOCKET, _SOCKETPAIR, _PRLIMIT = (41, 198), (53, 199), (302, 261)
_CLONE, _CLONE3 = (56, 220), (435, 435)
_AF_UNIX = 1
_NEW_NAMESPACE = 0x7E020080
"""The flags of clone that make a namespace (time, mount, cgroup, uts, ipc, user, pid, net)."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
"""Load a word of the call's record; jump if the word equals, is at least, or shares a bit with a constant; return."""
_NUMBER_AT, _MACHINE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_X32 = 0x40000000
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""The column of the tables, and the kernel's name of the machine."""


def _step(code: int, constant: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, constant)


def _answer(number: int | None, verdict: int) -> bytes:
    """Return the steps that answer one call, or nothing if this machine does not have it."""
    return b"" if number is None else _step(_EQUAL, number, 0, 1) + _step(_RETURN, verdict)


def filter_program(machine: str | None = None) -> bytes:
    """Return the filter for a machine (this one unless given).

    Raises:
        OSError: the machine's numbers are not in the tables.
    """
    machine = machine or platform.machine()
    if machine not in _MACHINES:
        raise OSError(errno.ENOSYS, f"there is no filter of system calls for {machine}")
    column, name = _MACHINES[machine]
    deny = _ERROR | errno.EPERM
    steps = [
        _step(_LOAD, _MACHINE_AT),
        _step(_EQUAL, name, 1, 0),  # another machine's calls (32-bit programs) have other numbers
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER_AT),
        _step(_AT_LEAST, _X32, 0, 1),  # x32 programs use these numbers for the same calls
        _step(_RETURN, _KILL),
        *(_answer(numbers[column], _KILL) for numbers in KILLED.values()),
        *(_answer(numbers[column], deny) for numbers in DENIED.values()),
        # The flags of clone3 are in memory, where a filter cannot look. libc falls back to clone.
        _answer(_CLONE3[column], _ERROR | errno.ENOSYS),
        _step(_EQUAL, _CLONE[column], 0, 4),
        _step(_LOAD, _FIRST_ARGUMENT_AT),
        _step(_ANY_BIT, _NEW_NAMESPACE, 0, 1),
        _step(_RETURN, _KILL),
        _step(_RETURN, _ALLOW),
        _only(_SOCKET[column], _AF_UNIX, _KILL),
        _only(_SOCKETPAIR[column], _AF_UNIX, _KILL),
        # Limits of another process: process 1 may be of the same user, and would end by a limit that it does not have.
        _only(_PRLIMIT[column], 0, deny),
        _step(_RETURN, _ALLOW),
    ]
    return b"".join(steps)


def _only(number: int, argument: int, otherwise: int) -> bytes:
    """Return the steps that allow a call if its first argument is `argument`."""
    return (
        _step(_EQUAL, number, 0, 4)
        + _step(_LOAD, _FIRST_ARGUMENT_AT)
        + _step(_EQUAL, argument, 1, 0)
        + _step(_RETURN, otherwise)
        + _step(_RETURN, _ALLOW)
    )
