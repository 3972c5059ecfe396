"""LoadResult: what a trainer says about where it starts from.

Path: made by `trainer.load`, read by the driver, which has no Megatron loaded. Invariant: plain values only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LoadResult:
    """`state` is what `save` was given, None on a fresh start; `source` names the actor's weights for the log."""

    next_rollout_id: int
    state: dict[str, Any] | None
    source: str
