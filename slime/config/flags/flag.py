"""`flag(...)` declares one option as a dataclass field: its default, its help and its bounds.

The name on the command line is the field's name with dashes. Booleans take `--x` and `--no-x`. A field
typed `Literal[...]` is a choice, one typed `tuple[T, ...]` takes one or more values, and one typed
`str | tuple[str, ...]` holds a single value bare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal, NewType

Secret = Literal["all", "url"]
"""The secret part of a value: all of it, or the user, the password and the query of a URL."""
JsonObject = NewType("JsonObject", str)
"""The type of a field that holds the text of a JSON object. In YAML, its value may also be a mapping."""


@dataclass(frozen=True)
class Needs:
    """Other flags without which a flag has no effect; `rules.no_effect` then warns about it if it was given."""

    flags: tuple[str, ...]
    """The flags of which at least one must be given, or switched on."""
    value: str | None = None
    """The value that it has to have; None: any."""
    why: str = ""
    """Completes the text "no effect: ..."; the default names the flag that it belongs to."""
    remedy: str = "leave it out"
    when_on: bool = False
    """Whether to warn only if the flag, a switch, is on; while it is off, it changes nothing anyway."""

    def missing(self, values: Mapping[str, Any]) -> bool:
        """Return whether the needed flags lack the value (or any value) in `values`, which has all flags by name."""
        found = [values[name] for name in self.flags]
        return self.value not in found if self.value is not None else all(value in (None, False, ()) for value in found)

    @property
    def reason(self) -> str:
        """Return `why`, or its default."""
        value = "" if self.value is None else f" {self.value}"
        return self.why or f"it belongs to --{self.flags[0].replace('_', '-')}{value}"


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
    needs: Needs | None = None,
) -> Any:
    """Declare an option of the command line.

    `ge/gt/le/lt`: bounds, which are checked when the value is not None.
    `choices`: the allowed values, if they come from a table; otherwise the field's type is a Literal of them.
    `nargs`: an exact number of values for a tuple field (otherwise one or more).
    `secret`: the part of the value that others must not see. Every output shows that part masked.
    `needs`: the flags without which this one has no effect.
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
        "needs": needs,
    }
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)
