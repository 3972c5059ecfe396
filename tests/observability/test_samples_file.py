"""samples.jsonl continues over a resume with no row lost and none twice; trackers get a few rows of each step."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread

import pytest

from slime.observability.samples_file import (
    COLUMNS,
    LONGEST_CELL,
    TABLE_ROWS,
    NewSamples,
    Row,
    SamplesFile,
    read_samples,
    rewind_samples,
    table,
)

EVAL = "eval/a b"


def unbroken(path: Path, steps: range, *, ahead: bool) -> None:
    """Write what a run does with two samples a rollout and an evaluation after each; `ahead` generates one early."""
    file = SamplesFile(path)
    if not steps.start:
        file.write(0, EVAL, [{"index": 0}])
    for step in steps:
        if not (ahead and step > steps.start):
            file.write(step + 1, "train", [{"index": index} for index in (0, 1)])
        if ahead and step + 1 < steps.stop:
            file.write(step + 2, "train", [{"index": index} for index in (0, 1)])
        file.write(step + 1, EVAL, [{"index": 0}])


@pytest.mark.parametrize("ahead", [False, True])
def test_a_resumed_file_has_each_row_once(tmp_path: Path, ahead: bool) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "samples.jsonl"
    unbroken(whole, range(4), ahead=ahead)
    unbroken(broken, range(3), ahead=ahead)
    with broken.open("ab") as file:
        file.write(b'{"step": 4, "split": "tra')  # a kill
    assert rewind_samples(broken, 2) is None
    SamplesFile(broken).write(2, EVAL, [{"index": 0}])  # the evaluation that was due at the checkpoint
    unbroken(broken, range(2, 4), ahead=ahead)
    order = [sorted(map(str, read_samples(path))) for path in (whole, broken)]
    assert order[0] == order[1]
    assert len(set(order[1])) == len(order[1]) == 13


def test_without_the_rewind_rows_come_twice(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    unbroken(path, range(3), ahead=False)
    unbroken(path, range(2, 4), ahead=False)
    rows = list(map(str, read_samples(path)))
    assert len(set(rows)) < len(rows)


def test_damaged_lines_are_kept_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    unbroken(path, range(2), ahead=False)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"not a row\n", *lines[1:], b"[1]\n", b'{"cut']))
    with pytest.raises(ValueError, match=r"samples\.jsonl:2: not a sample"):
        list(read_samples(path))
    warning = rewind_samples(path, None)
    assert warning is not None and warning.endswith("2 lines were not samples, and were moved to samples-damaged.jsonl")
    assert path.read_bytes() == b"".join(lines)
    assert (tmp_path / "samples-damaged.jsonl").read_text() == "not a row\n[1]\n"
    before = path.stat().st_ino
    assert rewind_samples(path, None) is None
    assert path.stat().st_ino == before, "a file with nothing to remove is not written again"


def test_any_text_survives(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    texts = ["\ud800 half a pair", 'quotes " and \\', "line\nbreak\u2028\r", "größer 数", "\x00\x1b[0m"]
    SamplesFile(path).write(1, 'eval/"x\\', [{"prompt": text} for text in texts])
    assert [row["prompt"] for row in read_samples(path)] == texts
    assert "größer 数" in path.read_text(errors="strict"), "readable as it is"
    SamplesFile(path).write(2, "train", [])
    assert len(path.read_bytes().splitlines()) >= len(texts)


def test_writers_do_not_mix_their_lines(tmp_path: Path) -> None:
    file = SamplesFile(tmp_path / "samples.jsonl")
    rows = [{"prompt": "x" * 20_000}] * 20
    threads = [Thread(target=file.write, args=(step, "train", rows)) for step in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [row["step"] for row in read_samples(file.path)].count(3) == 20


def test_trackers_get_new_rows_of_finished_steps(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    file = SamplesFile(path)
    file.write(1, "train", [{"index": 0}])
    new = NewSamples(path)
    assert list(new.take(9)) == [], "what was there before"
    file.write(2, "train", [{"index": index} for index in range(TABLE_ROWS + 5)])
    file.write(3, "train", [{"index": 0}])
    file.write(1, 'eval/"x', [{"index": 7}])
    with path.open("ab") as half:
        half.write(b'{"step": 3, "split": "train", "index": 1')
    taken = {(step, split): rows for step, split, rows in new.take(2)}
    assert [row["index"] for row in taken[2, "train"]] == list(range(TABLE_ROWS))
    assert [row["index"] for row in taken[1, 'eval/"x']] == [7]
    assert len(taken) == 2, "step 3 is not finished"
    with path.open("ab") as half:
        half.write(b"}\n")
    assert [(step, [row["index"] for row in rows]) for step, _, rows in new.take(3)] == [(3, [0, 1])]
    assert list(new.take(9)) == []


def test_cells_are_short() -> None:
    row: Row = {"index": 3, "prompt": "a" * 5000 + "end", "components": {"x": 1}, "reward": None}
    [cells] = table([row])
    by_name = dict(zip(COLUMNS, cells, strict=True))
    assert len(str(by_name["prompt"])) < LONGEST_CELL + 50
    assert str(by_name["prompt"]).endswith("aend") and "[... 3003 characters ...]" in str(by_name["prompt"])
    assert (by_name["index"], by_name["reward"], by_name["components"]) == (3, None, json.dumps({"x": 1}))
