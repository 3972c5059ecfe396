"""LoadResult: the point from which a trainer starts.

- Used by: `trainer.load` makes it; the driver reads it, without Megatron in its process.
- Invariant: it holds plain values only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LoadResult:
    """A trainer's start: `state` is what `save` got (None on a fresh start), `source` is the weights' origin."""

    next_rollout_id: int
    state: dict[str, Any] | None
    source: str
