"""The address that other hosts use to reach this machine.

- Used by: the engines, their weight sync group and the rules on both.
- Invariant: a service that only this machine uses stays on loopback.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Return whether `host` (a name or an address) is this machine's own loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def own_address(towards: str) -> str:
    """Return this machine's address on the network route to the host `towards`."""
    if is_loopback(towards):
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))  # UDP: chooses a route and sends nothing
        return probe.getsockname()[0]


def address_for(urls: Iterable[str]) -> str:
    """Return an address at which all `urls` reach this machine: loopback, unless one of them is on another host."""
    elsewhere = [host for url in urls if not is_loopback(host := urlsplit(url).hostname or "")]
    return own_address(elsewhere[0]) if elsewhere else LOOPBACK
