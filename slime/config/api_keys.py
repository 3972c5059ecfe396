"""API keys on the command line: what one may consist of, and the router's ID:NAME:ROLE:KEY.

Path: `rules` checks every key that was given, and `engine.keys` reads the router's. Invariant: no error here repeats a
key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FORMAT = "ID:NAME:ROLE:KEY"


@dataclass(frozen=True)
class ControlKey:
    """One key for the router's list of engines. Only `role` admin may read or change that list."""

    id: str
    name: str
    role: Literal["admin", "user"]
    key: str


def key_fault(key: str) -> str | None:
    """The reason why `key` cannot be sent as `Authorization: Bearer KEY`; None where it can."""
    if not key:
        return "is empty, and an empty key is no key"
    if not all("!" <= character <= "~" for character in key):
        return "has a space, a control character or a letter outside ASCII, which no HTTP header carries"
    return None


def control_key(text: str) -> ControlKey:
    """Read ID:NAME:ROLE:KEY; the key itself may hold further colons.

    Raises:
        ValueError: the reason, without the text.
    """
    parts = text.split(":", 3)
    if len(parts) != 4:
        raise ValueError(f"has {len(parts)} of the 4 parts {FORMAT}")
    id, name, role, key = parts
    if role.lower() not in ("admin", "user"):
        raise ValueError("has another role than admin or user in its third part")
    if not id or not name or id.startswith("-"):
        raise ValueError("has no ID or no NAME in its first two parts, or an ID that starts with -")
    if fault := key_fault(key):
        raise ValueError(f"has a KEY that {fault}")
    return ControlKey(id, name, "admin" if role.lower() == "admin" else "user", key)
