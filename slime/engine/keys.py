"""The API keys of a run: for its engines, for its router, and for the router's list of engines.

- Called by: the driver calls `with_keys` before it starts a process. Engines and router are started with these keys,
  and every client takes them from `Keys.of`.
- Invariant: what the run starts answers only to the run's keys. No engine receives the run's key for the list of
  engines.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from slime.config.api_keys import control_key
from slime.config.args import Args, FrozenMapping

RUN = "slime"
"""ID and name of the run's own key for the list of engines, as the router's audit log shows it."""


@dataclass(frozen=True)
class Keys:
    """The keys that clients send as `Authorization: Bearer KEY`; None sends nothing.

    The router replaces its own key with the key with which an engine was registered.
    """

    engine: str | None = None
    """Sent to an engine directly."""
    router: str | None = None
    """Sent with requests that the router passes on to an engine."""
    control: str | None = None
    """Sent to read and to change the router's list of engines."""

    @classmethod
    def of(cls, args: Args) -> Keys:
        """Return the keys in `args`; without an admin key, the router's own key also opens its list."""
        router = args.router.get("api_key")
        parsed = map(control_key, args.router.get("control_plane_api_keys") or ())
        admins = (key.key for key in parsed if key.role == "admin")
        return cls(engine=args.sglang.get("api_key"), router=router, control=next(admins, router))


NO_KEYS = Keys()


def with_keys(args: Args) -> Args:
    """Return `args` with a random key wherever the run starts something and the user gave no key.

    If the user gave only a key for engines, the router gets the same one. A router of the run's own gets one more key,
    for its list of engines, in addition to those that the user gave.
    """
    given = args.sglang.get("api_key")
    makes_engine_key = given is None and args.starts_engines and args.engines_take_keys
    sglang: Mapping[str, Any] = {"api_key": new_key()} if makes_engine_key else {}
    router: dict[str, Any] = {}
    own_router = args.sglang_router_ip is None
    if args.router.get("api_key") is None:
        router["api_key"] = new_key() if given is None and own_router else given
    if own_router:
        others = args.router.get("control_plane_api_keys") or ()
        router["control_plane_api_keys"] = (f"{RUN}:{RUN}:admin:{new_key()}", *others)
    return replace(
        args, sglang=FrozenMapping({**args.sglang, **sglang}), router=FrozenMapping({**args.router, **router})
    )


def new_key() -> str:
    """Return a random key of 256 bits."""
    return secrets.token_hex(32)
