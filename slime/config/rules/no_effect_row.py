"""A row of the tables of `no_effect`.

Path: `no_effect` and `no_effect_algorithms` are made of them. Invariant: a row is about flags that were given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slime.config.args import Args


@dataclass(frozen=True)
class NoEffect:
    """`fields` do nothing while `when` holds; `why` completes "no effect: ..."."""

    fields: tuple[str, ...]
    when: Callable[[Args], bool]
    why: str
    remedy: str = "leave it out"
