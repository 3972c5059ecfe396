"""Choose the run's Ray before it is imported: one at RAY_ADDRESS that answers, or a protected one of its own.

- Called by: `main`, before anything imports ray, which reads these variables at that moment. The processes that Ray
  starts inherit them.
- Invariant: the run's own Ray listens on this machine only, and requires a token. A cluster that the run joins
  (RAY_ADDRESS) stays as its owner set it up, and so does every one of these variables that the user has set.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import time

from slime.config.problem import Problem

LOOPBACK_ALONE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""A Ray variable: with 0, Ray uses 127.0.0.1 as its address, also on Linux; otherwise it listens on all interfaces."""
AUTH_MODE, AUTH_TOKEN, AUTH_TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

ADDRESS = "RAY_ADDRESS"
ANSWER_WITHIN_S = 10.0
"""Seconds for the Ray at RAY_ADDRESS to accept a connection: it may be starting."""
_REMEDY = "correct it, or unset it, and the run starts a Ray of its own"


def address_fault(address: str, *, within: float = ANSWER_WITHIN_S) -> Problem | None:
    """Return why no Ray can be joined at `address`, the value of RAY_ADDRESS; None if one may be there.

    Ray itself would wait for minutes. The meaning of `auto` is left to Ray.
    """
    if address in ("auto", "local"):
        return None
    if "://" in address:
        what = "for Ray Client" if address.startswith("ray://") else "for `ray job submit`"
        return _wrong(address, f"the address is {what}", "write it as HOST:PORT of `ray start --head`, or unset it")
    parts = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\s]+)):([0-9]{1,5})", address)
    if parts is None or not 0 < int(parts[3]) < 65536:
        return _wrong(address, "no address of the form HOST:PORT", _REMEDY)
    deadline = time.monotonic() + within
    while True:
        try:
            socket.create_connection((parts[1] or parts[2], int(parts[3])), timeout=within).close()
            return None
        except OSError as error:
            if time.monotonic() >= deadline:
                return _wrong(address, f"no Ray answers there ({error.strerror or error})", _REMEDY)
        time.sleep(min(0.5, within))


def _wrong(address: str, rule: str, remedy: str) -> Problem:
    return Problem(severity="error", where=f"{ADDRESS}={address}", rule=rule, remedy=remedy)


def protect_local_ray() -> None:
    """Set the variables for a local Ray, unless the run joins one.

    The token belongs to this run, and is in no file: only its user can read the environment of a process.
    """
    if os.environ.get(ADDRESS):
        return
    os.environ.setdefault(LOOPBACK_ALONE, "0")
    if os.environ.setdefault(AUTH_MODE, "token") == "token" and AUTH_TOKEN_PATH not in os.environ:
        os.environ.setdefault(AUTH_TOKEN, secrets.token_hex(32))
