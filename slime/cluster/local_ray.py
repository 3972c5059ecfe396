"""Which Ray a run takes, before it is imported: one at RAY_ADDRESS that answers, or one of its own, which is protected.

Path: `program` calls this before anything imports ray, which reads these variables then; the processes that Ray starts
inherit them. A Ray of the run's own listens on this machine alone, and asks for a token. Invariant: a cluster that runs
already (RAY_ADDRESS) is as its owner set it up, and so is whatever the user has said in one of these variables.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import time

LOOPBACK_ALONE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""At 0 Ray takes 127.0.0.1 for this node's address, on Linux, too; else all its servers listen on every interface."""
AUTH_MODE, AUTH_TOKEN, AUTH_TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

ADDRESS = "RAY_ADDRESS"
ANSWER_WITHIN_S = 10.0
"""Seconds for the Ray at RAY_ADDRESS to take a connection: it may be starting."""
_REMEDY = "correct it, or unset it, and the run starts a Ray of its own"


def address_fault(address: str, *, within: float = ANSWER_WITHIN_S) -> str | None:
    """Why no Ray can be joined at `address`, the value of RAY_ADDRESS; None where one may be.

    Ray itself would wait for minutes. What `auto` means is Ray's to find out.
    """
    if address in ("auto", "local"):
        return None
    if "://" in address:
        what = "Ray Client's" if address.startswith("ray://") else "no Ray's: `ray job submit` takes such a one"
        return f"{ADDRESS}={address}: the address is {what}; write it as HOST:PORT of `ray start --head`, or unset it"
    parts = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\s]+)):([0-9]{1,5})", address)
    if parts is None or not 0 < int(parts[3]) < 65536:
        return f"{ADDRESS}={address}: no address of the form HOST:PORT; {_REMEDY}"
    deadline = time.monotonic() + within
    while True:
        try:
            socket.create_connection((parts[1] or parts[2], int(parts[3])), timeout=within).close()
            return None
        except OSError as error:
            if time.monotonic() >= deadline:
                return f"{ADDRESS}={address}: no Ray answers there ({error.strerror or error}); {_REMEDY}"
        time.sleep(min(0.5, within))


def protect_local_ray() -> None:
    """Set the variables, unless Ray runs already.

    The token is the run's own, and stands in no file: a process's environment is its user's to read.
    """
    if os.environ.get(ADDRESS):
        return
    os.environ.setdefault(LOOPBACK_ALONE, "0")
    if os.environ.setdefault(AUTH_MODE, "token") == "token" and AUTH_TOKEN_PATH not in os.environ:
        os.environ.setdefault(AUTH_TOKEN, secrets.token_hex(32))
