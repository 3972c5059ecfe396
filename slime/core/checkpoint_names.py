"""The names of a checkpoint's directory, `iter_0000012` for rollout 12, and of the files in it that others read.

- Used by: `megatron.checkpoint` writes and finds such directories; the driver counts them after a fault, and the rules
  look at them before a run starts.
- Invariant: all functions agree, for every rollout.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_ITERATION = re.compile(r"iter_(\d{7,})")
METADATA = ".metadata"
"""The file that every checkpoint in torch_dist format has."""
RUN = "run"
"""The key under which the state of a checkpoint has the content of RUN_FILE while it is saved."""
RUN_FILE = "slime_run.json"
"""A small file with the flags of the run that wrote the checkpoint, and with what decides its place in the data."""


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


def checkpoints_in(directory: str | Path) -> dict[int, Path]:
    """Return the checkpoints in `directory` by rollout, in ascending order; none if it does not exist.

    Whether they are complete is checked when one is loaded.
    """
    try:
        names = os.listdir(directory)
    except OSError:
        return {}
    found = {rollout_id: Path(directory) / name for name in names if (rollout_id := rollout_of(name)) is not None}
    return {rollout_id: found[rollout_id] for rollout_id in sorted(found) if (found[rollout_id] / METADATA).is_file()}
