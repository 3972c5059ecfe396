"""The format of API keys on the command line, and of the router's keys ID:NAME:ROLE:KEY.

- Used by: `rules`, which checks every given key, and `engine.keys`, which reads the router's keys.
- Invariant: no error message here contains a key.
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
    """Return why `key` cannot be sent as `Authorization: Bearer KEY`, or None if it can."""
    if not key:
        return "is empty, and an empty key does not count as a key"
    if not all("!" <= character <= "~" for character in key):
        return "has a space, a control character or a letter outside ASCII, which no HTTP header can carry"
    return None


def control_key(text: str) -> ControlKey:
    """Parse ID:NAME:ROLE:KEY; the key itself may contain colons.

    Raises:
        ValueError: the text has another form; the message gives the reason but not the text.
    """
    parts = text.split(":", 3)
    if len(parts) != 4:
        raise ValueError(f"has {len(parts)} of the 4 parts {FORMAT}")
    id, name, role, key = parts
    if role.lower() not in ("admin", "user"):
        raise ValueError("has a role other than admin or user in its third part")
    if not id or not name or id.startswith("-"):
        raise ValueError("has no ID or no NAME in its first two parts, or an ID that starts with -")
    if fault := key_fault(key):
        raise ValueError(f"has a KEY that {fault}")
    return ControlKey(id, name, "admin" if role.lower() == "admin" else "user", key)
