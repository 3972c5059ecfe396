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
from pathlib import Path
from typing import Any

from slime.config.problem import Problem

LOOPBACK_ALONE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""A Ray variable: with 0, Ray uses 127.0.0.1 as its address, also on Linux; otherwise it listens on all interfaces."""
AUTH_MODE, AUTH_TOKEN, AUTH_TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

ADDRESS = "RAY_ADDRESS"
ANSWER_WITHIN_S = 10.0
"""Seconds for the Ray at RAY_ADDRESS to accept a connection: it may be starting."""
CLUSTER_ID = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""The method of Ray's control store that its clients call first, and that requires the token."""
_REMEDY = "correct it, or unset it, and the run starts a Ray of its own"


def address_fault(address: str, *, within: float = ANSWER_WITHIN_S) -> Problem | None:
    """Return why no Ray can be joined at `address`, the value of RAY_ADDRESS; None if one may be there.

    Ray itself would wait for minutes, also for one that requires another token. The meaning of `auto` is left to Ray.
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
            break
        except OSError as error:
            if time.monotonic() >= deadline:
                return _wrong(address, f"no Ray answers there ({error.strerror or error})", _REMEDY)
        time.sleep(min(0.5, within))
    return None if os.environ.get("RAY_USE_TLS") == "1" else _refusal(address, within)


def _refusal(address: str, within: float) -> Problem | None:
    """Ask what listens at `address` for the cluster's id, as Ray does first, and return why it gives none."""
    import grpc  # it comes with Ray, and takes a moment

    def ask(token: str | None) -> Any:
        headers = () if token is None else (("authorization", f"Bearer {token}"),)
        try:
            with grpc.insecure_channel(address) as channel:
                channel.unary_unary(CLUSTER_ID)(b"", timeout=within, metadata=headers)
            return grpc.StatusCode.OK
        except grpc.RpcError as error:
            return error.code()

    answer = ask(None)
    if answer in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        rule = "what listens there is no Ray, or it does not answer"
        return _wrong(address, rule, "give the address that `ray start --head` prints, or unset it")
    if answer is not grpc.StatusCode.UNAUTHENTICATED:
        return None
    token, source = _token()
    if token is not None and ask(token) is not grpc.StatusCode.UNAUTHENTICATED:
        return None
    rule = "this Ray requires a token, and " + ("the run has none" if token is None else f"that of {source} is another")
    remedy = f"set {AUTH_MODE}=token and {AUTH_TOKEN} to the token of its `ray start`, or copy it to ~/.ray/auth_token"
    return _wrong(address, rule, remedy)


def _token() -> tuple[str | None, str]:
    """Return the token that Ray takes, and where it comes from, in Ray's order; None if it takes none."""
    if os.environ.get(AUTH_MODE) not in (None, "token"):
        return None, ""
    own = os.environ.get(AUTH_TOKEN)
    if own:
        return own, AUTH_TOKEN
    file = Path(os.environ.get(AUTH_TOKEN_PATH) or Path.home() / ".ray" / "auth_token")
    try:
        return file.read_text().strip() or None, str(file)
    except (OSError, UnicodeDecodeError):
        return None, ""


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
