"""The files that a program in the sandbox sees: Python, the system's libraries, five devices, a scratch directory.

- Used by: `inside`, as process 1 of new namespaces.
- Invariant: nothing of the machine is in the view except PATHS and Python itself, all of it read-only. Homes, /etc,
  /proc, /sys, /run, other users' files and the sockets in them have no path. What is written goes to a file system in
  memory, whose size is limited.
"""

from __future__ import annotations

import os

from slime.sandbox import kernel

SCRATCH = "/scratch"
USER = 1000
"""The program's user and group as it sees them."""
PATHS = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
"""Files that Python needs in addition to its own directory, as far as it exists."""
DEVICES = ("null", "zero", "full", "random", "urandom")
_INODES = 4096
_READ_ONLY = kernel.ATTR_RDONLY | kernel.ATTR_NOSUID


def build(python: str, scratch_bytes: int) -> int:
    """Replace the root of all paths; return a descriptor of the namespace's /proc, which has no path.

    `python` is the directory of the interpreter (sys.base_prefix).

    Raises:
        OSError: a step is not allowed here; the text names it.
    """
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    # Descriptors, because the new root may hide the paths, and a directory may lie below one that we may not enter.
    sources = {path: os.open(path, os.O_PATH) for path in _needed(python)}
    devices = {f"/dev/{name}": os.open(f"/dev/{name}", os.O_PATH) for name in DEVICES}
    root = next(path for path in ("/tmp", "/run", "/mnt", "/var") if os.path.isdir(path))
    kernel.mount("tmpfs", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, f"mode=755,size=1m,nr_inodes={_INODES}")
    for path, descriptor in sources.items():
        _show(root, path, descriptor, _READ_ONLY | kernel.ATTR_NODEV)
    for path, descriptor in devices.items():
        _show(root, path, descriptor, _READ_ONLY | kernel.ATTR_NOEXEC)
    for path in PATHS:
        if os.path.islink(path):  # such as /lib -> usr/lib
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.symlink(os.readlink(path), root + path)
    processes = _processes(root)
    os.mkdir(root + SCRATCH)
    quiet = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    size = f"mode=700,uid={USER},gid={USER},size={scratch_bytes},nr_inodes={_INODES}"
    kernel.mount("tmpfs", root + SCRATCH, "tmpfs", quiet, size)
    for path in ("/tmp", "/dev/shm"):
        os.symlink(SCRATCH, root + path)
    for descriptor in (*sources.values(), *devices.values()):
        os.close(descriptor)
    kernel.become_root(root)
    kernel.restrict_mount("/", _READ_ONLY | kernel.ATTR_NODEV, recursive=False)
    return processes


def _needed(python: str) -> list[str]:
    """Return the directories and files to show, without those that lie in another one of them."""
    found = [path for path in (python, *PATHS) if os.path.exists(path) and not os.path.islink(path)]
    return [path for path in found if not any(path.startswith(other.rstrip("/") + "/") for other in found)]


def _show(root: str, path: str, descriptor: int, attributes: int) -> None:
    """Mount the file or directory `descriptor` at the same path below `root`."""
    target = root + path
    source = f"/proc/self/fd/{descriptor}"
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    kernel.mount(source, target, None, kernel.MS_BIND | kernel.MS_REC)
    kernel.restrict_mount(target, attributes, recursive=True)


def _processes(root: str) -> int:
    """Open the /proc of the new namespace, in which the supervisor measures, and take its path away again."""
    target = f"{root}/proc"
    os.mkdir(target)
    kernel.mount("proc", target, "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    kernel.detach(target)
    os.rmdir(target)
    return descriptor
