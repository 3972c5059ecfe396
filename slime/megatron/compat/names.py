"""One row of the table of private names: names of Megatron, torch or SGLang that slime replaces or relies on.

- Used by: `patches` and `optimizer_patches` have the rows, `apply` checks them.
- Invariant: a row says why the names are used and where, so that it can be removed with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Names:
    """Names of one module or class that slime uses for one reason."""

    target: str
    """The dotted path of the module or class."""
    names: tuple[str, ...]
    why: str
    where: str
    """The module of slime that replaces or uses them."""
    how: Literal["has", "mentions", "elsewhere"] = "has"
    """The check. `has`: the target has the attribute. `mentions`: the module's source contains the name, because
    its code reads or sets it on other objects, or looks for it. `elsewhere`: nothing, because the package need not be
    installed here."""
    cuda_only: bool = False
