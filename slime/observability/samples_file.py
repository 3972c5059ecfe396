"""samples.jsonl: what was sampled and how it was judged, one JSON object for each sample.

- Used by: the rollout manager appends rows; the driver continues the file when a run resumes, and passes a few rows of
  each step on to the trackers.
- Invariant: a resumed run continues the file as the uninterrupted run would have: rows that were written after the
  checkpoint are removed first, so that no sample is in the file twice.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

SAMPLES = "samples.jsonl"
TRAIN = "train"
"""The split of samples that are trained on; the splits of evaluations are `eval/NAME`."""
TABLE_ROWS = 16
"""The most rows of one split and step that trackers get."""
LONGEST_CELL = 2000
"""Characters of a text in a tracker's table; of a longer one the middle is left out."""
_HEAD = re.compile(rb'\{"step": (\d+), "split": "((?:[^"\\]|\\.)*)",')
"""The beginning of every row, from which a reader sees which rows it has to parse."""

Row = Mapping[str, Any]


class SamplesFile:
    """Appends whole rows; several threads may write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def write(self, step: int, split: str, rows: Iterable[Row]) -> None:
        """Append `rows`, one after the other, so that no more than one is in memory as text.

        `step` counts as in metrics.jsonl.
        """
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                for row in rows:
                    text = json.dumps({"step": step, "split": split, **row}, ensure_ascii=False)
                    file.write(text.encode(errors="backslashreplace") + b"\n")  # half a surrogate pair: JSON's \uXXXX


def rewind_samples(path: Path, step: int | None) -> str | None:
    """Remove the rows that a run resumed after `step` rollouts writes again; return a warning about damaged lines.

    Those are the samples of later rollouts, and the evaluations after `step` rollouts or more. With `step` None nothing
    is written again. A last line that was cut short by a kill is removed without a warning; other lines that are not
    rows are moved into samples-damaged.jsonl.
    """
    if not path.exists() or not any(_fate(line, step) != "keep" for line in _lines(path)):
        return None
    written, aside = path.with_name(f".tmp_{path.name}"), path.with_name(f"{path.stem}-damaged.jsonl")
    damaged = 0
    with written.open("wb") as kept:
        for line in _lines(path):
            fate = _fate(line, step)
            if fate == "keep":
                kept.write(line)
            elif fate == "damaged":
                damaged += 1
                with aside.open("ab") as file:
                    file.write(line)
    written.rename(path)
    return f"{path}: {damaged} lines were not samples, and were moved to {aside.name}" if damaged else None


def _fate(line: bytes, step: int | None) -> str:
    """Return what `rewind_samples` does with a line: keep, drop, or damaged."""
    if not line.endswith(b"\n"):
        return "drop"
    row = parse_row(line)
    if row is None:
        return "damaged"
    if step is None:
        return "keep"
    return "keep" if row["step"] < step or (row["step"] == step and row["split"] == TRAIN) else "drop"


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Return one line of a samples.jsonl as a row; None if it is not a JSON object with step and split."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    found = cast(dict[str, Any], row)
    return found if type(found.get("step")) is int and isinstance(found.get("split"), str) else None


def read_samples(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a samples.jsonl, in order.

    Raises:
        ValueError: a line is not a row; the message names file and line.
    """
    for number, line in enumerate(_lines(path), 1):
        row = parse_row(line)
        if row is None:
            raise ValueError(f"{path}:{number}: not a sample (a JSON object with step and split); remove the line")
        yield row


class NewSamples:
    """Reads the rows that are appended to a samples.jsonl from now on, for the tables of trackers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end = path.stat().st_size if path.exists() else 0
        self._waiting: dict[tuple[int, str], list[Row]] = {}
        """The rows by step and split, at most TABLE_ROWS of each; those of a rollout in advance wait for its step."""

    def take(self, step: int) -> Iterator[tuple[int, str, list[Row]]]:
        """Yield (step, split, rows) of the new rows up to `step`; each is yielded once."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._end)
                self._read(file)
        for key in sorted(key for key in self._waiting if key[0] <= step):
            yield *key, self._waiting.pop(key)

    def _read(self, file: BinaryIO) -> None:
        for line in file:
            if not line.endswith(b"\n"):
                return  # it is still being written
            self._end += len(line)
            head = _HEAD.match(line)
            if head is None:
                continue
            rows = self._waiting.setdefault((int(head[1]), json.loads(b'"' + head[2] + b'"')), [])
            if len(rows) < TABLE_ROWS and (row := parse_row(line)) is not None:
                rows.append(row)


COLUMNS = (
    "group", "index", "prompt", "response", "label", "reward", "components", "failure", "status", "response_tokens"
)  # fmt: skip
"""The columns of a tracker's table."""


def table(rows: Iterable[Row]) -> list[list[str | float | None]]:
    """Return the cells of `rows` by COLUMNS, with long texts shortened."""
    return [[_cell(row.get(name)) for name in COLUMNS] for row in rows]


def _cell(value: Any) -> str | float | None:
    if value is None or isinstance(value, int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    left_out = len(text) - LONGEST_CELL
    if left_out <= 0:
        return text
    half = LONGEST_CELL // 2
    return f"{text[:half]} [... {left_out} characters ...] {text[-half:]}"
