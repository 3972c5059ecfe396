"""Keys with dots, and rows whose values lie where a key does not lead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from slime.config.data_files import read_rows
from slime.config.data_rows import MISSING, DataKeys, Row, find
from slime.config.rules.data import check_rows

VERL: dict[str, Any] = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "1 + 1?"}],
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 0, "split": "train"},
}
KEYS = DataKeys(
    input_key="prompt", label_key="reward_model.ground_truth", metadata_key="extra_info", tool_key="extra_info.tools"
)


@pytest.mark.parametrize(
    ("data", "key", "value"),
    [
        ({"a": {"b": {"c": 1}}}, "a.b.c", 1),
        ({"a.b": 1, "a": {"b": 2}}, "a.b", 1),
        ({"a.b": {"c": 1}, "a": {"b.c": 2, "b": {"c": 3}}}, "a.b.c", 1),
        ({"a.b": {"d": 1}, "a": {"b.c": 2, "b": {"c": 3}}}, "a.b.c", 2),
        ({"a": {"b": None}}, "a.b", None),
        ({"a": {"b": 1}}, "a.c", MISSING),
        ({"a": [1]}, "a.0", MISSING),
        ({"": {"": 1}}, ".", 1),
    ],
)
def test_dots_lead_into_objects(data: dict[str, Any], key: str, value: object) -> None:
    assert find(data, key) is value


def _files(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_struct_array(pyarrow.array(rows)), folder / "a.parquet")
    return [str(folder / "a.jsonl"), str(folder / "a.parquet")]


def test_nested_values_are_found_in_both_formats(tmp_path: Path) -> None:
    for file in _files(tmp_path, [VERL, VERL | {"reward_model.ground_truth": "3"}]):
        rows = [row.data for row in read_rows(file, KEYS) if isinstance(row, Row)]
        assert KEYS.label(rows[1]) == "3"
        assert KEYS.metadata(rows[0]) == {"index": 0, "split": "train"}
        assert KEYS.tools(rows[0]) is None
        assert rows[0]["data_source"] == "openai/gsm8k"
    for file in _files(tmp_path, [VERL]):
        assert check_rows(file, KEYS, chat_template=True) == []
        assert [KEYS.label(row.data) for row in read_rows(file, KEYS) if isinstance(row, Row)] == ["2"]


@pytest.mark.parametrize(
    ("label_key", "rule", "remedy"),
    [
        ("reward_model.truth", "reward_model.truth'; it has", "--label-key"),
        ("reward_model.style.x", "reward_model.style.x'; it has", "--label-key"),
        ("reward_model", "'reward_model' is {", "name an entry of it, such as --label-key reward_model."),
    ],
)
def test_a_key_that_leads_nowhere_is_named(tmp_path: Path, label_key: str, rule: str, remedy: str) -> None:
    keys = DataKeys(input_key="prompt", label_key=label_key, metadata_key="metadata", tool_key=None)
    for file in _files(tmp_path, [VERL]):
        [problem] = check_rows(file, keys, chat_template=True)
        assert rule in problem.rule
        assert remedy in problem.remedy


def test_a_repeated_inner_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "reward_model": {"ground_truth": "1", "ground_truth": "2"}}')
    [problem] = check_rows(str(file), KEYS, chat_template=False)
    assert problem.rule == "the key 'ground_truth' is repeated"


def test_a_key_inside_an_object_counts_as_there(tmp_path: Path) -> None:
    for file in _files(tmp_path, [VERL]):
        assert check_rows(file, KEYS, chat_template=True, needs=("extra_info.split",)) == []
        [problem] = check_rows(file, KEYS, chat_template=True, needs=("extra_info.tools",))
        assert problem.rule == "no row has 'extra_info.tools'"
