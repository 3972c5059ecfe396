"""`flag(...)` declares one option as a dataclass field: its default, its help and its bounds.

The name on the command line is the field's name with dashes. Booleans take `--x` and `--no-x`. A field
typed `Literal[...]` is a choice, one typed `tuple[T, ...]` takes one or more values.
"""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import Any, Literal

Secret = Literal["all", "url"]
"""The secret part of a value: all of it, or the user, the password and the query of a URL."""


def flag(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    nargs: int | None = None,
    secret: Secret | None = None,
) -> Any:
    """Declare an option of the command line.

    `ge/gt/le/lt`: bounds, which are checked when the value is not None.
    `choices`: the allowed values, if they come from a table; otherwise the field's type is a Literal of them.
    `nargs`: an exact number of values for a tuple field (otherwise one or more).
    `secret`: the part of the value that others must not see. Every output shows that part masked.
    `default=MISSING` makes the option required.
    """
    metadata = {
        "help": help,
        "ge": ge,
        "gt": gt,
        "le": le,
        "lt": lt,
        "choices": choices,
        "metavar": metavar,
        "nargs": nargs,
        "secret": secret,
    }
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)
