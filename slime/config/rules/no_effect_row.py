"""The type of a row in the tables of `no_effect` and `no_effect_algorithms`.

- Used by: these two modules.
- Invariant: a row leads to warnings only about flags that were given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slime.config.args import Args


@dataclass(frozen=True)
class NoEffect:
    """`fields` have no effect if `when` returns True; `why` completes the text "no effect: ..."."""

    fields: tuple[str, ...]
    when: Callable[[Args], bool]
    why: str
    remedy: str = "leave it out"
