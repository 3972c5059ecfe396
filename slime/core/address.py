"""Which address of this machine others reach it at.

Path: engines, their weight group and the rules about them go by what this says. Invariant: what talks to this machine
alone stays on loopback.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an address) is this machine's own loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def own_address(towards: str) -> str:
    """This machine's address on the way to the host `towards`."""
    if is_loopback(towards):
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))  # sends nothing
        return probe.getsockname()[0]


def address_for(urls: Iterable[str]) -> str:
    """The address at which all of `urls` reach this machine: loopback, unless one of them stands elsewhere."""
    elsewhere = [host for url in urls if not is_loopback(host := urlsplit(url).hostname or "")]
    return own_address(elsewhere[0]) if elsewhere else LOOPBACK
