"""Compare two runs: their weights, the samples that they consumed, and their metrics.

- Used by: `sweep` compares each killed and resumed run with the unbroken one.
- Invariant: nothing is compared within a tolerance. Only wall times, rates that depend on them, memory, and the counts
  of faults are left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slime.megatron.checkpoint.safe_pickle import read_metadata
from slime.models.hf_files import HFReader
from slime.observability.metrics_log import read_metrics
from tests.saved_state import as_lists, read_whole

MOST = 5
"""The most differences of one kind that are listed."""
DUMPS, EXPORTS = "dump", "hf"
"""The directories of --save-debug-rollout-data and --save-hf, under the run's own."""


def differences(reference: Path, other: Path, *, all_exports: bool = True) -> list[str]:
    """Return the differences of two run directories; empty if the runs are equal.

    Without `all_exports` the other run has saved less often, and must have only the last export.
    """
    kinds = (_metrics, _samples, _states, _tensors, _exports)
    found: list[str] = []
    for kind in kinds:
        some = [f"{kind.__name__.removeprefix('_')}: {text}" for text in kind(reference, other)]
        found += some[:MOST] + ([f"... and {len(some) - MOST} more"] if len(some) > MOST else [])
    if all_exports:
        found += [f"exports: {text}" for text in _names(reference / EXPORTS, other / EXPORTS, "[!.]*")]
    return found


def is_measured(key: str) -> bool:
    """Return whether a metric depends on the clock or on memory, or counts the faults themselves."""
    parts = key.split("/")
    return parts[0] in ("time", "memory", "sync", "fault") or parts[-1] == "time" or parts[-1].endswith("_per_second")


def _metrics(reference: Path, other: Path) -> Iterator[str]:
    """Compare all events in order, except those that contain only measurements."""

    def events(path: Path) -> list[dict[str, float]]:
        kept = ({k: v for k, v in event.items() if not is_measured(k)} for event in read_metrics(path))
        return [event for event in kept if len(event) > 1]

    yield from _of_lists("event", events(reference / "metrics.jsonl"), events(other / "metrics.jsonl"))


def _samples(reference: Path, other: Path) -> Iterator[str]:
    """Compare every sample of every rollout: tokens, log-probs, versions, rewards, metadata."""
    yield from _names(reference / DUMPS, other / DUMPS, "*.jsonl")
    for path in sorted((reference / DUMPS).glob("*.jsonl")):
        if (other / DUMPS / path.name).exists():
            ours, theirs = (
                [sample for line in file.read_text().splitlines() for sample in json.loads(line)]
                for file in (path, other / DUMPS / path.name)
            )
            yield from _of_lists(f"rollout {path.stem} sample", ours, theirs)


def _states(reference: Path, other: Path) -> Iterator[str]:
    """Compare each checkpoint's data side: cursor, samples, policy version. One that is due for removal may be left."""
    for path in list(reference.glob("iter_*")):
        if not (other / path.name).exists():
            yield f"no {path.name}"
    for ours, theirs in _pairs(reference, other, "iter_*"):
        first, second = (
            {**as_lists(read_whole(path)), "file_digests": None, "file_sizes": None} for path in (ours, theirs)
        )
        for state in (first, second):
            state["state"].pop("times", None)
            made = state["state"]["rollout"].get("made")  # the rollout that waits to be trained on has metrics already
            if made is not None:
                made["metrics"] = {name: value for name, value in made["metrics"].items() if not is_measured(name)}
        yield from _of_values(ours.name, first, second)


def _tensors(reference: Path, other: Path) -> Iterator[str]:
    """Compare the bytes of every piece of each checkpoint: weights, optimizer, random number generators."""
    for ours, theirs in _pairs(reference, other, "iter_*"):
        yield from _of_values(ours.name, _pieces(ours), _pieces(theirs))


def _exports(reference: Path, other: Path) -> Iterator[str]:
    last = max((path.name for path in (reference / EXPORTS).glob("[!.]*")), key=int)
    if not (other / EXPORTS / last).exists():
        yield f"no {last}"
    for ours, theirs in _pairs(reference / EXPORTS, other / EXPORTS, "[!.]*"):
        first, second = (
            {name: _digest(reader.get(name).numpy().tobytes()) for name in reader.names()}
            for reader in (HFReader(ours), HFReader(theirs))
        )
        yield from _of_values(f"export {ours.name}", first, second)


def _pieces(path: Path) -> dict[str, str]:
    """Return the digest of each part of each tensor, by its name and offset."""
    pieces: dict[str, str] = {}
    for index, place in (read_metadata(path).storage_data or {}).items():
        with (path / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            pieces[f"{index.fqn} at {tuple(index.offset or ())}"] = _digest(file.read(place.length))
    return pieces


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _pairs(reference: Path, other: Path, pattern: str) -> Iterator[tuple[Path, Path]]:
    for path in sorted(reference.glob(pattern)):
        if (other / path.name).exists():
            yield path, other / path.name


def _names(reference: Path, other: Path, pattern: str) -> Iterator[str]:
    ours, theirs = (sorted(path.name for path in directory.glob(pattern)) for directory in (reference, other))
    if ours != theirs:
        yield f"{' '.join(ours)} in the unbroken run, {' '.join(theirs) or 'none'} here"


def _of_lists(what: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> Iterator[str]:
    if len(ours) != len(theirs):
        yield f"{len(ours)} {what}s in the unbroken run, {len(theirs)} here"
    for number, (first, second) in enumerate(zip(ours, theirs, strict=False)):
        yield from _of_values(f"{what} {number}", first, second)


def _of_values(what: str, ours: Any, theirs: Any) -> Iterator[str]:
    """Yield the differences of two JSON values, each with its path."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}, key=str):
            yield from _of_values(f"{what}, {key}", ours.get(key, "nothing"), theirs.get(key, "nothing"))
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, (first, second) in enumerate(zip(ours, theirs, strict=True)):
            yield from _of_values(f"{what}[{number}]", first, second)
    elif repr(ours) != repr(theirs):  # compare by repr: NaN equals itself, and 1 differs from 1.0
        yield f"{what}: {str(ours)[:120]} in the unbroken run, {str(theirs)[:120]} here"
