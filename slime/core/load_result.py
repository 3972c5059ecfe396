"""LoadResult: the point from which a trainer starts.

- Used by: `trainer.load` makes it; the driver reads it, without Megatron in its process.
- Invariant: it holds plain values only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LoadResult:
    """A trainer's start: the `state` given to `save` (None: a fresh start), and the `source` of its weights."""

    next_rollout_id: int
    state: dict[str, Any] | None
    source: str
