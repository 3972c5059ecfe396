"""The name of a checkpoint's directory, `iter_0000012` for rollout 12.

- Used by: `megatron.checkpoint` writes and finds such directories; the driver counts them after a fault.
- Invariant: both functions agree, for every rollout.
"""

from __future__ import annotations

import re

_ITERATION = re.compile(r"iter_(\d{7,})")


def iteration_name(rollout_id: int) -> str:
    """Return the name of the directory that holds the checkpoint of this rollout."""
    return f"iter_{rollout_id:07d}"


def rollout_of(name: str) -> int | None:
    """Return the rollout of the checkpoint whose directory has this name; None: it is not such a name."""
    match = _ITERATION.fullmatch(name)
    return None if match is None else int(match[1])
