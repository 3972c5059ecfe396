"""What a Ray of the run's own is told before it is imported: to listen on this machine alone, and to ask for a token.

Path: `program` calls this before anything imports ray, which reads these variables then; the processes that Ray starts
inherit them. Invariant: a cluster that runs already (RAY_ADDRESS) is as its owner set it up, and so is whatever the
user has said in one of these variables.
"""

from __future__ import annotations

import os
import secrets

LOOPBACK_ALONE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""At 0 Ray takes 127.0.0.1 for this node's address, on Linux, too; else all its servers listen on every interface."""
AUTH_MODE, AUTH_TOKEN, AUTH_TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def protect_local_ray() -> None:
    """Set the variables, unless Ray runs already.

    The token is the run's own, and stands in no file: a process's environment is its user's to read.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    os.environ.setdefault(LOOPBACK_ALONE, "0")
    if os.environ.setdefault(AUTH_MODE, "token") == "token" and AUTH_TOKEN_PATH not in os.environ:
        os.environ.setdefault(AUTH_TOKEN, secrets.token_hex(32))
