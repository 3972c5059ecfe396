"""The name of a checkpoint's directory, `iter_0000012` for rollout 12.

- Used by: `megatron.checkpoint` writes and finds such directories; the driver counts them after a fault.
- Invariant: all functions agree, for every rollout.
"""

from __future__ import annotations

import re
from pathlib import Path

_ITERATION = re.compile(r"iter_(\d{7,})")


def iteration_name(rollout_id: int) -> str:
    """Return the name of the directory that holds the checkpoint of this rollout."""
    return f"iter_{rollout_id:07d}"


def rollout_of(name: str) -> int | None:
    """Return the rollout of the checkpoint whose directory has this name; None: it is not such a name."""
    match = _ITERATION.fullmatch(name)
    return None if match is None else int(match[1])


def newest_checkpoint(save: str | None) -> int | None:
    """Return the last rollout with a checkpoint in `save`; a checkpoint gets its name only when it is complete."""
    found = [] if save is None else [rollout_of(path.name) for path in Path(save).glob("iter_*")]
    return max((rollout_id for rollout_id in found if rollout_id is not None), default=None)
