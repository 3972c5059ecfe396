"""Checkpoint directories on the disk: list them, check that they are complete, choose one, remove old ones.

- Used by: `save_load` writes to and reads from the directories that are found here; so do the converters.
- Invariant: a directory `iter_*` or `release` gets its name by the rename of a finished one. Therefore one that is not
  complete was damaged later.

    <dir>/iter_0000005/                     rollout 5: .metadata, metadata.json, common.pt, *.distcp,
                                            slime_state.safetensors (samples), slime_state.json (manifest, state)
    <dir>/release/                          the converter's output: weights only, otherwise the same
    <dir>/latest_checkpointed_iteration.txt Megatron's tracker, for other tools; written last, never read here
    <dir>/best_checkpoint.json              names the checkpoint that evaluated best (`observability.best_checkpoint`)
    <dir>/.tmp_*                            unfinished
"""

from __future__ import annotations

import fnmatch
import glob
import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from slime.config.experiment_trackers import TRACKERS
from slime.core.checkpoint_names import rollout_of
from slime.megatron.checkpoint.manifest import PARTS, STATE_FILE, NewerFormatError, changed_files, read_state, sizes
from slime.megatron.checkpoint.safe_pickle import METADATA, UnreadableFileError, read_metadata
from slime.models.hf_files import is_hf_directory
from slime.observability.best_checkpoint import FILE as BEST
from slime.observability.best_checkpoint import read_best

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
TMP_PREFIX = ".tmp_"
CRITIC = "critic"
"""The directory inside a checkpoint that holds the critic's checkpoint."""
DAMAGED = ".damaged"
"""The suffix of a checkpoint that a resumed run has set aside."""
OWN_FILES = (
    "args*.yaml",
    "run*.json",
    "metrics*",
    "logs",
    "*.lock",
    "*.log",
    "samples*",
    "*.png",
    *(name for tracker in TRACKERS.values() for name in tracker.files),
    TRACKER,
    BEST,
    f"{TMP_PREFIX}*",
)
"""Files that a run itself leaves next to its checkpoints (glob patterns)."""


@dataclass(frozen=True)
class FoundCheckpoint:
    """A complete checkpoint. `rollout_id` is the last rollout that was trained on; None for weights only."""

    path: Path
    kind: Literal["iteration", "release", "hf"]
    rollout_id: int | None = None
    verified: bool = field(default=False, compare=False)
    """Whether all bytes of all its files have been compared with what was written."""

    def part(self, name: str) -> FoundCheckpoint | None:
        """Return the checkpoint of another model that was saved inside this one; None if there is none."""
        inner = self.path / name
        found = FoundCheckpoint(inner, "iteration", self.rollout_id, self.verified)
        return found if (inner / STATE_FILE).is_file() else None


def find_checkpoint(
    load_dir: str | Path | None,
    *,
    step: int | None = None,
    own: Sequence[str | None] = (),
    damaged: Mapping[str, str] | None = None,
) -> FoundCheckpoint | None:
    """Return the newest complete checkpoint in `load_dir`, or the one of rollout `step`; None: start from elsewhere.

    The result is None if no directory is given, it does not exist, or it holds nothing but a run's own files and
    checkpoints that were never finished. Damaged checkpoints next to a complete one are logged. `load_dir` may also be
    a checkpoint itself, or an HF directory.

    Args:
        own: the paths that the run's flags name for other output, with `{rollout_id}` in them; None if not given.
        damaged: the names of checkpoints that are known to be damaged, and why; they are skipped.

    Raises:
        ValueError: the directory is something else, all checkpoints in it are damaged, or `step` is not there.
    """
    damaged = damaged or {}
    root = Path(load_dir) if load_dir is not None else None
    if root is None or not root.exists():
        return _none_at_step(load_dir, step, [])
    if not root.is_dir():
        raise ValueError(f"{root} is a file; name a checkpoint directory")
    itself = _checkpoint_itself(root)
    if itself is not None:
        if step not in (None, itself.rollout_id):
            raise ValueError(
                f"--ckpt-step {step}: {root} is itself a checkpoint, of another rollout or of none; name the directory "
                "around it, or leave the flag out"
            )
        return itself
    iterations = _iterations(root)
    if step is not None:
        return _at_step(root, iterations, step)
    for rollout_id in sorted(iterations, reverse=True):
        if iterations[rollout_id].name not in damaged and _is_complete(iterations[rollout_id]):
            return FoundCheckpoint(iterations[rollout_id], "iteration", rollout_id)
    release = root / RELEASE
    if release.is_dir() and not iterations and _is_complete(release):
        return FoundCheckpoint(release, "release")
    _refuse_damaged(root, [*iterations.values(), *([release] if release.is_dir() else [])], damaged)
    _refuse_strangers(root, [*OWN_FILES, *_entries(root, own)])
    return None


def _checkpoint_itself(path: Path) -> FoundCheckpoint | None:
    """Return `path` as an HF directory or as a single checkpoint; None if it is neither."""
    if is_hf_directory(path):
        return FoundCheckpoint(path, "hf")
    if not (path / ".metadata").is_file():
        return None
    problem = why_incomplete(path)
    if problem is not None:
        raise ValueError(f"{path} is an incomplete checkpoint: {problem}; name another one")
    rollout_id = rollout_of(path.name)
    return FoundCheckpoint(path, "release" if rollout_id is None else "iteration", rollout_id)


def _iterations(root: Path) -> dict[int, Path]:
    found = {rollout_of(path.name): path for path in root.iterdir() if path.is_dir()}
    return {rollout_id: path for rollout_id, path in found.items() if rollout_id is not None}


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
    """Refuse checkpoints of rollouts that are still to come: they are another branch, which a resume would load.

    Raises:
        ValueError: `save_dir` holds a complete checkpoint of `next_rollout_id` or a later one.
    """
    root = Path(save_dir)
    later = {n: path for n, path in (_iterations(root) if root.is_dir() else {}).items() if n >= next_rollout_id}
    branch = [path.name for _, path in sorted(later.items()) if why_incomplete(path) is None]
    if branch:
        raise ValueError(
            f"--save {root}: holds {', '.join(branch)}, and this run starts at rollout {next_rollout_id}: an abandoned "
            "branch, which a resume would take for this run's own; take another --save, or move these away with: "
            f"{_move_away(root, branch)}"
        )


def _move_away(root: Path, names: Sequence[str]) -> str:
    """Return a shell command that moves these away without loss: `mv` moves them into a new directory."""
    away = str(root.resolve() / "abandoned")
    moved = shlex.join(["mv", "--no-clobber", *(str(root.resolve() / name) for name in names), away])
    return f"{shlex.join(['mkdir', '--parents', away])} && {moved}"


def set_aside(found: FoundCheckpoint) -> list[Path]:
    """Rename the checkpoints that are newer than `found`, the newest sound one, and return their new paths.

    They are damaged, otherwise `found` would be one of them. If they kept their names, the next save would overwrite
    them and the next resume would read them again.
    """
    moved: list[Path] = []
    for rollout_id, path in sorted(_iterations(found.path.parent).items()):
        if found.rollout_id is not None and rollout_id > found.rollout_id:
            number, target = 1, path.with_name(f"{path.name}{DAMAGED}")
            while target.exists():
                number, target = number + 1, path.with_name(f"{path.name}{DAMAGED}-{number + 1}")
            moved.append(path.rename(target))
    return moved


def _refuse_damaged(root: Path, checkpoints: Sequence[Path], damaged: Mapping[str, str]) -> None:
    """Refuse a directory whose checkpoints are all damaged: to start without them would lose what was trained."""
    reasons = {path.name: damaged.get(path.name) or why_incomplete(path) for path in sorted(checkpoints)}
    reasons |= {path.name: "set aside" for path in sorted(root.glob(f"iter_*{DAMAGED}*"))}
    problems = [f"{name}: {why}" for name, why in reasons.items() if why is not None]
    if problems:
        raise ValueError(
            f"{root} holds no complete checkpoint ({'; '.join(problems)}): restore one, "
            "or move these away to start again"
        )


def _entries(root: Path, own: Sequence[str | None]) -> Iterator[str]:
    """Yield glob patterns of the entries directly under `root` that lead to the paths `own`."""
    for path in own:
        if path is not None and (whole := Path(path).resolve()).is_relative_to(root.resolve()):
            for entry in whole.relative_to(root.resolve()).parts[:1]:
                yield re.sub(r"\{.*?\}", "*", glob.escape(entry))


def _refuse_strangers(root: Path, own: Sequence[str]) -> None:
    """Refuse files that are not a run's own: a wrong path is more likely than an empty start."""
    strangers = [
        path.name
        for path in sorted(root.iterdir())
        if not any(fnmatch.fnmatchcase(path.name, pattern) for pattern in own)
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
    """Return what a checkpoint directory lacks; None if every file that was written is there in its full size.

    The content of the large files is compared when they are loaded (`changed_files`).
    """
    # a checkpoint with weights alone may be Megatron's own, which writes no such file
    with_state = rollout_of(path.name) is not None or (path / STATE_FILE).exists()
    needed = [METADATA, "metadata.json", "common.pt", *([STATE_FILE] if with_state else [])]
    missing = [name for name in needed if not (path / name).is_file()]
    if missing:
        return f"no {', '.join(missing)}"
    try:
        state = read_state(path) if with_state else {}
    except NewerFormatError:
        raise
    except (OSError, ValueError) as error:
        return f"{STATE_FILE} is damaged: {error}"
    expected = sizes(state)
    for name in [*needed, *expected]:
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found is None:
            return f"no {name}"
        if found == 0 or found != expected.get(name, found):
            return f"{name} is damaged: {found} bytes of {expected.get(name, 'some')}"
    changed = changed_files(path, [name for name in needed if name in expected])
    if changed:
        return as_text(changed)
    for part in state.get(PARTS, []):
        problem = why_incomplete(path / part) if (path / part / STATE_FILE).is_file() else f"no {STATE_FILE}"
        if problem is not None:
            return f"{part}: {problem}"
    return _lost_piece(path)


def as_text(changed: Mapping[str, str]) -> str:
    """Return the answer of `changed_files` as text."""
    return "; ".join(f"{name}: {why}" for name, why in sorted(changed.items()))


def _lost_piece(path: Path) -> str | None:
    """Return a file that .metadata names and that is missing or short: it is on another node, or a copy was cut off."""
    try:
        storage = read_metadata(path).storage_data
    except UnreadableFileError as error:
        return str(error)
    lengths: dict[str, int] = {}
    for piece in storage.values():
        lengths[piece.relative_path] = max(lengths.get(piece.relative_path, 0), piece.offset + piece.length)
    for name, length in lengths.items():
        if not (path / name).is_file():
            return f"no {name}"
        if (path / name).stat().st_size < length:
            return f"{name} is cut short"
    return None


def begin(save_dir: Path, name: str) -> Path:
    """Create an empty `.tmp_<name>` to write to, and remove the leftovers of killed runs."""
    save_dir.mkdir(parents=True, exist_ok=True)
    for leftover in save_dir.glob(f"{TMP_PREFIX}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    written = save_dir / f"{TMP_PREFIX}{name}"
    written.mkdir()
    return written


@contextmanager
def nothing_left_of(written: Path, *, removes: bool) -> Iterator[None]:
    """Remove `written` if writing to it fails, because a full disk would stay full. Only the rank with `removes` does.

    Raises:
        RuntimeError: with the directory and the reason.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's writer does not report why it could not write; the free space shows whether the disk is full
        room = f" ({shutil.disk_usage(written.parent).free >> 20} MiB are free there)"
        if removes:
            shutil.rmtree(written, ignore_errors=True)
        named = str(written.parent) in str(error)
        what = str(error) if named else f"saving to {written.parent} failed: {error}"
        raise RuntimeError(f"{what}{room}") from error


def commit(written: Path, tracker: str) -> Path:
    """Rename a finished `.tmp_<name>` to `<name>`, then write the tracker; everything is on the disk afterwards."""
    save_dir, final = written.parent, written.with_name(written.name.removeprefix(TMP_PREFIX))
    old = save_dir / f"{TMP_PREFIX}old_{final.name}"
    for path in (*written.rglob("*"), written):
        _sync(path)
    if final.exists():
        final.rename(old)
    written.rename(final)
    _sync(save_dir)
    shutil.rmtree(old, ignore_errors=True)
    tracker_file = save_dir / f"{TMP_PREFIX}{TRACKER}"
    tracker_file.write_text(tracker)
    _sync(tracker_file)
    tracker_file.rename(save_dir / TRACKER)
    _sync(save_dir)
    return final


def _sync(path: Path) -> None:
    """Flush a file's content, or a directory's names, to the disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_old(save_dir: Path, keep: int, *, saved: int) -> list[Path]:
    """Remove all but the newest `keep` complete iterations up to `saved`, which was just written and stays.

    The checkpoint that evaluated best stays, too. `release` and damaged iterations are neither counted nor removed.
    Returns the paths that were removed.
    """
    iterations = _iterations(save_dir)
    complete = [number for number in sorted(iterations) if number <= saved and not why_incomplete(iterations[number])]
    best = read_best(save_dir)
    kept = None if best is None else best.rollout_id
    removed = [iterations[number] for number in complete[:-keep] if number != kept]
    for path in removed:
        # Rename first: if the run is killed halfway, this is a leftover and not a damaged checkpoint.
        doomed = path.rename(path.with_name(f"{TMP_PREFIX}old_{path.name}"))
        shutil.rmtree(doomed)
    return removed
