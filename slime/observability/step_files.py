"""The files of --save-debug-train-data: tensors by place and name, and an index in the order of the computation.

- Used by: `megatron.dump_steps` writes them, `tools/diff_steps.py` reads them.
- Invariant: every file is written under a temporary name and then renamed, and the index names complete files only. A
  run that was killed leaves everything that it had finished.

    index.json                       facts of the run; places in order, each with its tensors in order, and their files
    rollout-3-step-0-0.safetensors   tensors of the place "rollout 3, step 0"; a large place has several files
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

FLAG = "--save-debug-train-data"
INDEX = "index.json"
FORMAT = 1
MAX_FILE_BYTES = 4 * 1024**3
TMP_PREFIX = ".tmp_"

TOTAL_LENGTHS, RESPONSE_LENGTHS = "total_lengths", "response_lengths"
"""Tensors of a rollout: the number of tokens, and of response tokens, in each sample."""
PLACES, TOKEN_LOSS, LOSS = "places", "token_loss", "loss"
"""Tensors of a step: the positions of its tokens in the rollout, the loss of each, and their weighted sum."""


class Axis(StrEnum):
    """The axis along which a tensor has one entry, its first dimension."""

    SAMPLE = "sample"
    TOKEN = "token"
    RESPONSE = "response token"
    STEP = "response token of the step"
    ENTRY = "entry"


@dataclass(frozen=True)
class Entry:
    """One tensor, and the file that contains it."""

    name: str
    axis: Axis
    file: str


@dataclass
class Place:
    """A rollout, or one of its steps, and its tensors in the order in which they were computed."""

    name: str
    rollout_id: int
    tensors: list[Entry] = field(default_factory=list[Entry])


class StepFilesWriter:
    """Adds places to a directory, also to those of an earlier start of the same run."""

    def __init__(self, directory: Path, facts: Mapping[str, Any], *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        """Check that the directory can be written.

        Raises:
            ValueError: nothing can be written there.
        """
        self._directory, self._facts, self._max_file_bytes = directory, dict(facts), max_file_bytes
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._places = StepFiles(directory).places if (directory / INDEX).exists() else []
            probe = directory / f"{TMP_PREFIX}{INDEX}"
            probe.touch()
            probe.unlink()  # so that a run that fails before its first step leaves no file
        except OSError as error:
            raise ValueError(
                f"{FLAG} {directory}: cannot be written ({error.strerror}); name another directory"
            ) from error

    def forget_from(self, rollout_id: int) -> None:
        """Remove this rollout and later ones, because they will be trained on again."""
        dropped = [place for place in self._places if place.rollout_id >= rollout_id]
        self._places = [place for place in self._places if place.rollout_id < rollout_id]
        if dropped:
            self._write_index()
        for name in {entry.file for place in dropped for entry in place.tensors}:
            (self._directory / name).unlink()

    def begin(self, name: str, rollout_id: int) -> PlaceWriter:
        """Start a place, which becomes part of the index with its `end`."""
        return PlaceWriter(self._directory, Place(name, rollout_id), self._max_file_bytes, self._finish)

    def _finish(self, place: Place) -> None:
        self._places.append(place)
        self._write_index()

    def _write_index(self) -> None:
        index = {"format": FORMAT, "facts": self._facts, "places": [asdict(place) for place in self._places]}
        written = self._directory / f"{TMP_PREFIX}{INDEX}"
        written.write_text(json.dumps(index, indent=1) + "\n")
        written.rename(self._directory / INDEX)


class PlaceWriter:
    """Writes the tensors of one place. `StepFilesWriter.begin` returns it."""

    def __init__(self, directory: Path, place: Place, max_file_bytes: int, finish: Callable[[Place], None]) -> None:
        self._directory, self._place, self._max_file_bytes, self._finish = directory, place, max_file_bytes, finish
        self._pending: dict[str, Tensor] = {}
        self._num_files = 0

    def add(self, name: str, tensor: Tensor, axis: Axis) -> None:
        """Store a copy of `tensor` as the next tensor of the place."""
        if self._pending and sum(each.nbytes for each in self._pending.values()) + tensor.nbytes > self._max_file_bytes:
            self._flush()
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._place.tensors.append(Entry(name, axis, self._file_name()))

    def turn(self, count: int) -> None:
        """Reverse the order of the place's last `count` tensors, which were computed last to first."""
        at = len(self._place.tensors) - count
        self._place.tensors[at:] = self._place.tensors[: at - 1 if at else None : -1]

    def end(self) -> None:
        """Finish the place and write it to the index."""
        if self._pending:
            self._flush()
        self._finish(self._place)

    def _file_name(self) -> str:
        return f"{self._place.name.replace(', ', '-').replace(' ', '-')}-{self._num_files}.safetensors"

    def _flush(self) -> None:
        name = self._file_name()
        written = self._directory / f"{TMP_PREFIX}{name}"
        save_file(self._pending, written)
        written.rename(self._directory / name)
        self._pending = {}
        self._num_files += 1


class StepFiles:
    """Reads a directory of these files: its index at once, and tensors when they are requested."""

    def __init__(self, directory: Path) -> None:
        """Read the index.

        Raises:
            ValueError: there is no index, or it cannot be read.
        """
        self._directory = directory
        path = directory / INDEX
        if not path.is_file():
            raise ValueError(f"{directory}: there is no {INDEX}; name a directory that {FLAG} wrote")
        try:
            index: dict[str, Any] = json.loads(path.read_bytes())
            if index["format"] != FORMAT:
                raise ValueError(f"it has format {index['format']}, and this version reads {FORMAT}")
            self.facts: dict[str, Any] = index["facts"]
            self.places = [
                Place(each["name"], each["rollout_id"], [_entry(entry) for entry in each["tensors"]])
                for each in index["places"]
            ]
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not an index that {FLAG} wrote ({error!r})") from error

    def tensor(self, entry: Entry) -> Tensor:
        """Return one tensor.

        Raises:
            ValueError: its file is missing or damaged.
        """
        path = self._directory / entry.file
        if not path.is_file():
            raise ValueError(f"{path} is missing; {INDEX} lists {entry.name} in it")
        try:
            with cast(Any, safe_open(path, framework="pt")) as file:
                return file.get_tensor(entry.name)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, or has no {entry.name} ({error})") from error


def _entry(data: Mapping[str, str]) -> Entry:
    if Path(data["file"]).name != data["file"]:
        raise ValueError(f"{data['file']!r} is not a file in this directory")
    return Entry(data["name"], Axis(data["axis"]), data["file"])
