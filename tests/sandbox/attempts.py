"""Attempts to get out of the sandbox, or to harm the machine from inside. Each prints ESCAPED if it succeeds.

- Used by: `test_escapes`, which runs each one in the sandbox, and those that are harmless outside it as well, where
  they have to succeed: an attempt that cannot succeed anywhere would prove nothing.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from slime.sandbox.run import Outcome

_LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
_DONE = "\nprint('ESCAPED')"
_CHECK = "\nassert result >= 0, 'not allowed'" + _DONE


@dataclass(frozen=True)
class Attempt:
    """One attempt. `outcome`: how the sandbox ends it; None: it runs to its end without success."""

    program: str
    outcome: Outcome | None
    control: bool = True
    """Whether it is harmless, and has to succeed outside."""


def _call(number: str, *arguments: str) -> str:
    """Return a program that makes a system call directly, by its number on this machine."""
    return _LIBC + f"result = libc.syscall({', '.join([number, *arguments])})" + _CHECK


_X86 = platform.machine() == "x86_64"
_REFUSED, _CRASH, _TIMEOUT, _MEMORY = Outcome.REFUSED, Outcome.CRASH, Outcome.TIMEOUT, Outcome.MEMORY


ATTEMPTS = {
    # ---- network and sockets; HOST is filled in by the test
    "a server on loopback": Attempt(
        "import socket\nsocket.create_connection(('127.0.0.1', HOST['port']))" + _DONE, _REFUSED
    ),
    "a name server": Attempt("import socket\nsocket.getaddrinfo('localhost', 80)" + _DONE, _REFUSED, control=False),
    "an abstract socket": Attempt(
        "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0' + HOST['abstract'])" + _DONE, _CRASH
    ),
    "a socket file": Attempt("import socket\nsocket.socket(socket.AF_UNIX).connect(HOST['socket'])" + _DONE, _CRASH),
    "a netlink socket": Attempt("import socket\nsocket.socket(16, socket.SOCK_RAW, 0)" + _DONE, _REFUSED),
    "a socket to the hypervisor": Attempt(
        "import socket\nsocket.socket(40, socket.SOCK_STREAM)" + _DONE, _REFUSED, control=False
    ),
    # ---- files, environment, other processes
    "a file of the user": Attempt("open(HOST['file']).read()" + _DONE, _CRASH),
    "a link out of scratch": Attempt("import os\nos.symlink('/etc/passwd', 'l')\nopen('l').read()" + _DONE, _CRASH),
    "shared memory of the machine": Attempt("open(HOST['shared']).read()" + _DONE, _CRASH),
    "the environment": Attempt("import os\nif 'PLANTED' in os.environ: print('ESCAPED')", None),
    "a module on PYTHONPATH": Attempt("import planted_module" + _DONE, _CRASH),
    "the list of processes": Attempt("import os\nos.listdir('/proc')" + _DONE, _CRASH),
    "a kernel setting": Attempt("import os\nos.open('/proc/sys/vm/swappiness', os.O_WRONLY)" + _DONE, _CRASH),
    "a file of the system": Attempt("import os\nopen(os.__file__, 'a')" + _DONE, _CRASH),
    "a signal to the caller": Attempt("import os\nos.kill(HOST['pid'], 0)" + _DONE, _CRASH),
    "a signal to process 1": Attempt(
        "import os\nfor number in (1, 2, 9, 15, 19):\n  try: os.kill(1, number)\n  except PermissionError: pass\n"
        "if os.getppid() != 1: print('ESCAPED')",
        None,
        control=False,
    ),
    "a signal to everybody": Attempt("import os\nos.kill(-1, 0)" + _DONE, _CRASH),
    "a program that changes the user": Attempt("open('/usr/bin/su', 'rb').read(1)" + _DONE, _CRASH),
    "another user": Attempt("import os\nos.setuid(0)" + _DONE, _CRASH),
    "a device": Attempt("import os, stat\nos.mknod('d', 0o600 | stat.S_IFBLK, os.makedev(254, 0))" + _DONE, _CRASH),
    "standard input written": Attempt("import os\nos.write(0, b'x')" + _DONE, _CRASH, control=False),
    "a capability to be had": Attempt(
        _LIBC + "if libc.prctl(23, 21, 0, 0, 0) > 0: print('ESCAPED')  # CAP_SYS_ADMIN in the bounding set",
        None,
        control=os.getuid() == 0,
    ),
    "new privileges": Attempt(_LIBC + "if libc.prctl(39, 0, 0, 0, 0) == 0: print('ESCAPED')", None, control=False),
    # ---- system calls
    "tracing": Attempt(_LIBC + "result = libc.ptrace(0, 0, 0, 0)" + _CHECK, _REFUSED),
    "memory of a process": Attempt(
        _LIBC + "import os\nbuffer = ctypes.create_string_buffer(8)\n"
        "vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8)\n"
        "result = libc.process_vm_readv(os.getpid(), vector, ctypes.c_ulong(1), vector, ctypes.c_ulong(1), 0)" + _CHECK,
        _REFUSED,
    ),
    "a mount": Attempt(
        _LIBC + "result = libc.mount(b'none', b'/scratch', b'tmpfs', 0, None)" + _CHECK, _REFUSED, control=False
    ),
    "a remount": Attempt(_LIBC + "result = libc.mount(None, b'/', None, 32, None)" + _CHECK, _REFUSED, control=False),
    "an unmount": Attempt(_LIBC + "result = libc.umount2(b'/scratch', 2)" + _CHECK, _REFUSED, control=False),
    "another root": Attempt("import os\nos.chroot('/usr')" + _DONE, _REFUSED),
    "a new namespace": Attempt(_LIBC + "result = libc.unshare(0x10000000)" + _CHECK, _REFUSED),
    "a process in a new namespace": Attempt(
        _call("56 if X86 else 220", "0x10000011", "0", "0", "0", "0").replace(_CHECK, "\nimport os\nif result == 0:"
        " os._exit(0)" + _CHECK), _REFUSED,
    ),
    "keys of the kernel": Attempt(_call("250 if X86 else 219", "0", "-3", "1"), _REFUSED),
    "a ring of requests": Attempt(_call("425", "1", "ctypes.create_string_buffer(256)"), _CRASH, control=False),
    "shared memory of System V": Attempt(
        _LIBC + "result = libc.shmget(0, 4096, 0o1600)\nlibc.shmctl(result, 0, None)" + _CHECK, _CRASH
    ),
    "memory without a file": Attempt("import os\nos.memfd_create('x')" + _DONE, _CRASH),
    # ---- limits
    "a pair of other sockets": Attempt("import socket\nsocket.socketpair(30, 5)" + _DONE, _REFUSED, control=False),
    "limits of process 1": Attempt(
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU)" + _DONE, _CRASH
    ),
    "more open files": Attempt(
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))" + _DONE, _CRASH, control=False
    ),
    "a flood of descriptors": Attempt("kept = [open('/dev/null') for _ in range(200)]" + _DONE, _CRASH),
    "a flood of watchers": Attempt("import select\nkept = [select.epoll() for _ in range(200)]" + _DONE, _CRASH),
    "a fork bomb": Attempt(
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", _TIMEOUT, control=False
    ),
    "a flood of zombies": Attempt(
        "import os\nfor _ in range(500):\n  if os.fork() == 0: os._exit(0)\n" + _DONE, _CRASH, control=False
    ),
    "a flood of threads": Attempt(
        "import threading, time\nfor _ in range(99): threading.Thread(target=time.sleep, args=[9], daemon=True).start()"
        + _DONE,
        _CRASH,
        control=False,
    ),
    "memory": Attempt("x = bytearray(1 << 30)" + _DONE, _MEMORY, control=False),
    "memory of many processes": Attempt(
        "import os, time\nfor _ in range(6):\n  if os.fork() == 0:\n    x = bytearray(b'x') * (60 << 20)\n"
        "    time.sleep(9)\ntime.sleep(9)" + _DONE,
        _MEMORY,
        control=False,
    ),
    "a full disk": Attempt(
        "for n in range(40):\n  with open(f'f{n}', 'wb') as f: f.write(bytes(1 << 20))" + _DONE, _CRASH
    ),
    "a large file": Attempt("with open('f', 'wb') as f: f.truncate(1 << 30)" + _DONE, _CRASH),
    "huge output": Attempt("print('x' * (1 << 22))" + _DONE, _REFUSED),
    "endless errors": Attempt("import os\nwhile True: os.write(2, b'x' * 65536)", _REFUSED, control=False),
    "an endless loop": Attempt("while True: pass", _TIMEOUT, control=False),
    "a loop that ignores the limit": Attempt(
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", _TIMEOUT, control=False
    ),
    "a long sleep": Attempt("import time\ntime.sleep(60)", _TIMEOUT, control=False),
    "a stop of itself": Attempt("import os\nos.kill(os.getpid(), 19)", _TIMEOUT, control=False),
    "closed pipes and a sleep": Attempt(
        "import os, time\nos.closerange(0, 64)\ntime.sleep(60)", _TIMEOUT, control=False
    ),
    # ---- what stays behind: the test sees whether anybody still holds the channel
    "a daemon": Attempt(
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork(): os._exit(0)\n  time.sleep(60)\n"
        "time.sleep(0.1)",
        None,
        control=False,
    ),
}  # fmt: skip
if _X86:
    ATTEMPTS |= {
        "a call by its number for x32": Attempt(_call("0x40000029", "2", "1", "0"), _REFUSED, control=False),
        "a call of a 32-bit program": Attempt(
            "import ctypes, mmap\npage = mmap.mmap(-1, 4096, prot=7)\n"
            "page.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')  # getpid by interrupt 0x80\n"
            "address = ctypes.addressof(ctypes.c_char.from_buffer(page))\n"
            "result = ctypes.CFUNCTYPE(ctypes.c_int)(address)()" + _CHECK,
            _REFUSED,
        ),
    }
