"""Checkpoint directories: which are there, which are complete, which to take, which to remove.

Path: `checkpoint` writes and reads what is found here; the converters use it too. Invariant: a directory named
`iter_*` or `release` came there by a rename of a finished one, so that whatever is not whole is damaged or a leftover.

    <dir>/iter_0000005/                     rollout 5: .metadata, metadata.json, common.pt, *.distcp, slime_state.json
    <dir>/release/                          the converter's output: weights only
    <dir>/latest_checkpointed_iteration.txt Megatron's tracker, for other tools; written last, never read here
    <dir>/.tmp_*                            unfinished
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch.distributed.checkpoint.filesystem import FileSystemReader

from slime.models.hf_files import is_hf_directory

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
STATE_FILE = "slime_state.json"
TMP_PREFIX = ".tmp_"
_ITERATION = re.compile(r"iter_(\d{7,})")
OWN_FILES = (
    "args*.yaml",
    "metrics*",
    "logs",
    "*.log",
    "samples*",
    "*.png",
    "wandb",
    "tensorboard",
    "events.out.tfevents.*",
    TRACKER,
    f"{TMP_PREFIX}*",
)
"""What a run itself leaves beside its checkpoints (glob patterns)."""


@dataclass(frozen=True)
class FoundCheckpoint:
    """A complete checkpoint. `rollout_id`: the last rollout trained on; None: weights only."""

    path: Path
    kind: Literal["iteration", "release", "hf"]
    rollout_id: int | None = None


def iteration_name(rollout_id: int) -> str:
    return f"iter_{rollout_id:07d}"


def find_checkpoint(load_dir: str | Path | None, *, step: int | None = None) -> FoundCheckpoint | None:
    """The newest complete checkpoint in `load_dir`, or that of rollout `step`; None: start from elsewhere.

    None stands for: no directory given, none there, or one with nothing but a run's own files and unfinished or
    damaged checkpoints (each of which is logged). `load_dir` may also be a checkpoint itself, or an HF directory.

    Raises:
        ValueError: a directory of something else, or `step` is not there.
    """
    root = Path(load_dir) if load_dir is not None else None
    if root is None or not root.exists():
        return _none_at_step(load_dir, step, [])
    if not root.is_dir():
        raise ValueError(f"{root} is a file; name a checkpoint directory")
    if is_hf_directory(root):
        return FoundCheckpoint(root, "hf")
    if (root / ".metadata").is_file():
        return _checkpoint_itself(root)
    iterations = _iterations(root)
    if step is not None:
        return _at_step(root, iterations, step)
    for rollout_id in sorted(iterations, reverse=True):
        if _is_complete(iterations[rollout_id]):
            return FoundCheckpoint(iterations[rollout_id], "iteration", rollout_id)
    release = root / RELEASE
    if release.is_dir() and _is_complete(release):
        return FoundCheckpoint(release, "release")
    _refuse_strangers(root)
    return None


def _checkpoint_itself(path: Path) -> FoundCheckpoint:
    problem = why_incomplete(path)
    if problem is not None:
        raise ValueError(f"{path} is an incomplete checkpoint: {problem}; name another one")
    match = _ITERATION.fullmatch(path.name)
    return FoundCheckpoint(path, "iteration", int(match[1])) if match else FoundCheckpoint(path, "release")


def _iterations(root: Path) -> dict[int, Path]:
    matches = {path: _ITERATION.fullmatch(path.name) for path in root.iterdir() if path.is_dir()}
    return {int(match[1]): path for path, match in matches.items() if match}


def _at_step(root: Path, iterations: dict[int, Path], step: int) -> FoundCheckpoint | None:
    if step in iterations and _is_complete(iterations[step]):
        return FoundCheckpoint(iterations[step], "iteration", step)
    return _none_at_step(root, step, sorted(iterations))


def _none_at_step(load_dir: str | Path | None, step: int | None, there: list[int]) -> None:
    if step is not None:
        raise ValueError(
            f"--ckpt-step {step}: {load_dir} has no complete checkpoint of that rollout (there are: "
            f"{', '.join(map(str, there)) or 'none'}); name one of these, or leave the flag out for the newest"
        )


def refuse_abandoned(save_dir: str | Path, next_rollout_id: int) -> None:
    """Checkpoints of rollouts that the run is yet to come to are another branch: a resume would take these for its own.

    Raises:
        ValueError: `save_dir` holds a complete checkpoint of `next_rollout_id` or a later one.
    """
    root = Path(save_dir)
    later = {n: path for n, path in (_iterations(root) if root.is_dir() else {}).items() if n >= next_rollout_id}
    branch = [path.name for _, path in sorted(later.items()) if why_incomplete(path) is None]
    if branch:
        raise ValueError(
            f"--save {root}: holds {', '.join(branch)}, and this run starts at rollout {next_rollout_id}: an abandoned "
            "branch, which a resume would take for this run's own; take another --save, or move these away"
        )


def _refuse_strangers(root: Path) -> None:
    """Something else than a run's own files: more likely a wrong path than an empty start."""
    strangers = [
        path.name
        for path in sorted(root.iterdir())
        if not any(path.match(pattern) for pattern in OWN_FILES)
        and not (path.is_dir() and (path.name == RELEASE or _ITERATION.fullmatch(path.name)))
    ]
    if strangers:
        raise ValueError(
            f"{root} holds no checkpoint, but other files ({', '.join(strangers[:5])}): name a checkpoint directory, "
            "a Hugging Face directory, or an empty or missing one to start from --ref-load"
        )


def _is_complete(path: Path) -> bool:
    problem = why_incomplete(path)
    if problem is not None:
        logger.warning("skipping the incomplete checkpoint %s: %s", path, problem)
    return problem is None


def why_incomplete(path: Path) -> str | None:
    """What a checkpoint directory lacks, or None where every file that its metadata names is there, in full length."""
    needed = [".metadata", "metadata.json", "common.pt"] + ([] if path.name == RELEASE else [STATE_FILE])
    missing = [name for name in needed if not (path / name).is_file()]
    if missing:
        return f"no {', '.join(missing)}"
    try:
        storage: dict[Any, Any] = FileSystemReader(path).read_metadata().storage_data or {}
    except (pickle.UnpicklingError, EOFError, AttributeError) as error:
        return f".metadata cannot be read ({error!r})"
    lengths: dict[str, int] = {}
    for piece in storage.values():
        lengths[piece.relative_path] = max(lengths.get(piece.relative_path, 0), piece.offset + piece.length)
    for name, length in lengths.items():
        file = path / name
        if not file.is_file():
            return f"no {name}"
        if file.stat().st_size < length:
            return f"{name} is cut short"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote beside the weights.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads((path / STATE_FILE).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path / STATE_FILE} is damaged ({error}); load another checkpoint") from error


def write_state(path: Path, header: dict[str, Any]) -> None:
    (path / STATE_FILE).write_text(json.dumps(header))


def begin(save_dir: Path, name: str) -> Path:
    """An empty `.tmp_<name>` to write to; leftovers of killed runs go."""
    save_dir.mkdir(parents=True, exist_ok=True)
    for leftover in save_dir.glob(f"{TMP_PREFIX}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    written = save_dir / f"{TMP_PREFIX}{name}"
    written.mkdir()
    return written


def commit(written: Path, tracker: str) -> Path:
    """Rename a finished `.tmp_<name>` to `<name>`, then write the tracker."""
    save_dir, final = written.parent, written.with_name(written.name.removeprefix(TMP_PREFIX))
    old = save_dir / f"{TMP_PREFIX}old_{final.name}"
    if final.exists():
        final.rename(old)
    written.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    tracker_file = save_dir / f"{TMP_PREFIX}{TRACKER}"
    tracker_file.write_text(tracker)
    tracker_file.rename(save_dir / TRACKER)
    return final


def remove_old(save_dir: Path, keep: int, *, saved: int) -> list[Path]:
    """Remove all but the newest `keep` complete iterations up to `saved`, the one just written, which stays.

    `release` and damaged iterations are neither counted nor removed. Returns what was removed.
    """
    iterations = _iterations(save_dir)
    complete = [number for number in sorted(iterations) if number <= saved and not why_incomplete(iterations[number])]
    removed = [iterations[number] for number in complete[:-keep]]
    for path in removed:
        # Renamed first: killed halfway, it is a leftover and not a damaged checkpoint.
        doomed = path.rename(path.with_name(f"{TMP_PREFIX}old_{path.name}"))
        shutil.rmtree(doomed)
    return removed
