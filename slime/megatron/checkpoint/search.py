"""Choose the checkpoint that a run resumes from: the newest one of which no byte has changed.

- Used by: `trainer`, before any state is loaded, which also compares the HF files with those of the checkpoint;
  `save_load` verifies with the same functions.
- Invariant: all ranks get the same answer, or the same error. Every function here is collective.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from slime.config.args import Args
from slime.megatron.checkpoint import files, manifest
from slime.megatron.checkpoint.files import CRITIC, FoundCheckpoint
from slime.megatron.checkpoint.state_arrays import ARRAYS_FILE
from slime.models.hf_identity import changes, hf_identity

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
HF_FILES = "hf_files"
"""The key in a checkpoint's state."""


def find_sound_checkpoint(
    load_dir: str | Path | None, *, step: int | None = None, own: Sequence[str | None] = (), sets_aside: bool
) -> FoundCheckpoint | None:
    """Return what `find_checkpoint` finds, after every byte of it was compared with what was written.

    If the newest checkpoint is damaged, the newest sound one is taken, with a warning. A checkpoint that is named, by
    `step` or by its own path, is never replaced by another. `sets_aside`: the run saves into this directory, so damaged
    checkpoints are renamed; nothing is deleted.

    Raises:
        ValueError: as for `find_checkpoint`, or the named checkpoint is damaged.
    """
    damaged: dict[str, str] = {}
    while True:
        found = _found_by_rank_zero(lambda: files.find_checkpoint(load_dir, step=step, own=own, damaged=damaged))
        if found is None or found.kind == "hf":
            return found
        changed = changed_in(found)
        if not changed:
            break
        named = step is not None or load_dir is None or found.path == Path(load_dir) or found.kind == "release"
        if named:
            raise ValueError(damage_of(found, changed))
        damaged[found.path.name] = files.as_text(changed)
        if dist.get_rank() == 0:
            logger.warning("skipping the damaged checkpoint %s: %s", found.path, damaged[found.path.name])
    if sets_aside and found.kind == "iteration" and found.path != Path(load_dir or "") and step is None:
        for path in on_rank_zero(lambda: files.set_aside(found)):
            logger.warning("set aside as %s; the run resumes from %s", path, found.path)
    return replace(found, verified=True)


def _found_by_rank_zero(find: Callable[[], FoundCheckpoint | None]) -> FoundCheckpoint | None:
    """Return rank 0's result, or its ValueError, on every rank: nodes may see different directories."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = find()
        except (OSError, ValueError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def changed_in(found: FoundCheckpoint) -> dict[str, str]:
    """Return, on every rank, the files that are not what was written, and why; each rank reads a share of them.

    The arrays of the state are in rank 0's share, because it alone reads them later.
    """
    part = found.part(CRITIC)

    def own_share() -> dict[str, str]:
        changed: dict[str, str] = {}
        for path, prefix in [(found.path, "")] + ([] if part is None else [(part.path, f"{CRITIC}/")]):
            names = sorted(manifest.written_files(path), key=lambda name: name != ARRAYS_FILE)
            names = names[dist.get_rank() :: dist.get_world_size()]
            changed |= {f"{prefix}{name}": why for name, why in manifest.changed_files(path, names).items()}
        return changed

    return {name: why for share in on_every_rank(own_share) for name, why in share.items()}


def damage_of(found: FoundCheckpoint, changed: Mapping[str, str]) -> str:
    """Return the error text about a damaged checkpoint: its changed files, and the remedy."""
    return f"{found.path} is damaged: {files.as_text(changed)}; restore it, or take an earlier checkpoint (--ckpt-step)"


def on_rank_zero(work: Callable[[], _T], group: dist.ProcessGroup | None = None) -> _T:
    """Run `work` on rank 0; every rank gets its result or its error, so no rank waits for one that has failed.

    The message goes through `group`, which has all ranks; None: through the default group.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:  # noqa: BLE001  the others would wait for ever
            outcome[1] = f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise RuntimeError(f"checkpoint: {outcome[1]}")
    return outcome[0]


def on_every_rank(work: Callable[[], _T]) -> list[_T]:
    """Run `work` on each rank; every rank gets all results, or an error."""
    outcome: tuple[Any, str | None] = (None, None)
    try:
        outcome = work(), None
    except (OSError, ValueError) as error:
        outcome = None, f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    errors = [error for _, error in outcomes if error is not None]
    if errors:
        raise RuntimeError(f"checkpoint: {errors[0]}")
    return [result for result, _ in outcomes]


class HFFiles:
    """The identity of the files in --hf-checkpoint on this rank's machine, at the start of the run.

    A run resumes a checkpoint only with the tokenizer, chat template and config.json that it was trained with. `state`
    is JSON-able, for the checkpoint.
    """

    def __init__(self, args: Args) -> None:
        self._directory = args.hf_checkpoint
        self.state = {HF_FILES: None if self._directory is None else hf_identity(self._directory)}

    def refuse_others(self, found: FoundCheckpoint) -> None:
        """Raise a ValueError if the checkpoint was trained with other files; it names them and the remedy."""
        then, now = manifest.read_state(found.path)["state"].get(HF_FILES), self.state[HF_FILES]
        changed = [] if then is None or now is None else changes(then, now)
        if changed:
            raise ValueError(
                f"--hf-checkpoint {self._directory}: not what {found.path} was trained with ({'; '.join(changed)}); "
                "restore the files, or begin a new run with these weights: --finetune and another --save"
            )
