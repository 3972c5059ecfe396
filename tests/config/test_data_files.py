"""Data files row by row, slices, and evaluation sets."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from config_run import MESSAGE, Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slime.config.data_files import MAX_LINE, count_rows, read_rows, split_slice
from slime.config.data_rows import DataError, DataKeys, Row, label_text
from slime.config.eval_data import eval_datasets
from slime.config.rules.data import check_rows

KEYS = DataKeys(input_key="prompt", label_key="label", metadata_key="metadata", tool_key="tools")
WITHOUT_LABEL = replace(KEYS, label_key=None)


@pytest.mark.parametrize(
    ("path", "file", "part"),
    [
        ("a.jsonl", "a.jsonl", slice(None)),
        ("a.jsonl@[2:5]", "a.jsonl", slice(2, 5)),
        ("a@b.jsonl@[:5]", "a@b.jsonl", slice(None, 5)),
        ("a.jsonl@[-3:]", "a.jsonl", slice(-3, None)),
    ],
)
def test_slices(path: str, file: str, part: slice) -> None:
    assert split_slice(path) == (file, part)


@pytest.mark.parametrize("path", ["a.jsonl@[1]", "a.jsonl@[a:b]", "a.jsonl@[1:2", "a.jsonl@[-:2]"])
def test_bad_slices(path: str) -> None:
    with pytest.raises(ValueError, match="is not a slice"):
        split_slice(path)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        (json.dumps({"label": "2"}), "no key 'prompt'; it has label"),
        (json.dumps({"prompt": MESSAGE["prompt"]}), "no key 'label'; it has prompt"),
        (json.dumps(MESSAGE | {"label": None}), "'label' is None, not text or a number"),
        (json.dumps(MESSAGE | {"label": ["2"]}), "'label' is ['2'], not text or a number"),
        (json.dumps(MESSAGE | {"label": 10**22 + 1}), "a whole number has more than 64 bits"),
        (json.dumps(MESSAGE | {"metadata": "x"}), "'metadata' is 'x', not an object"),
        (json.dumps(MESSAGE | {"tools": {"name": "f"}}), "'tools' is "),
        (json.dumps(MESSAGE | {"prompt": 7}), "'prompt' is not a list of OpenAI messages"),
        (json.dumps(MESSAGE | {"prompt": ""}), "'prompt' is empty"),
        (json.dumps(MESSAGE | {"prompt": []}), "'prompt' is not a list of OpenAI messages"),
        (json.dumps(MESSAGE | {"prompt": [{"content": "x"}]}), "'prompt' is not a list of OpenAI messages"),
    ],
)
def test_faults(tmp_path: Path, line: str, fault: str) -> None:
    file = tmp_path / "a.jsonl"
    good = json.dumps(MESSAGE | {"more": 1})
    file.write_text(f"{good}\n\n{line}\n{good}\n")
    [problem] = check_rows(str(file), KEYS, chat_template=True)
    assert problem.where == f"{file}:3"
    assert problem.rule.startswith(fault)
    assert check_rows(f"{file}@[0:1]", KEYS, chat_template=True) == []


def test_messages_need_the_template(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(MESSAGE))
    [problem] = check_rows(str(file), WITHOUT_LABEL, chat_template=False)
    assert problem.remedy == "for OpenAI messages, add --apply-chat-template"


def test_many_faults_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("x\n" * 12)
    problems = check_rows(str(file), WITHOUT_LABEL, chat_template=True)
    assert len(problems) == 6
    assert problems[-1].rule == "7 more of 12 rows cannot be used"


def test_an_empty_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n")
    [problem] = check_rows(str(file), WITHOUT_LABEL, chat_template=True)
    assert problem.rule == "has no rows"


def test_a_key_given_by_flag_must_occur(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(MESSAGE) + "\n" + json.dumps(MESSAGE | {"tools": []}))
    assert check_rows(str(file), KEYS, chat_template=True, needs=("tools",)) == []
    [problem] = check_rows(f"{file}@[:1]", KEYS, chat_template=True, needs=("tools",))
    assert problem.rule == "no row has 'tools'"


def write_parquet(path: Path, rows: list[dict[str, Any]], **more: pyarrow.Array) -> str:
    """Write `rows` in row groups that slices cut; `more`: columns with explicit types."""
    table = pyarrow.Table.from_struct_array(pyarrow.array(rows))
    for name, column in more.items():
        table = table.append_column(name, column)
    pyarrow.parquet.write_table(table, path, row_group_size=3)
    return str(path)


def datas(path: str, keys: DataKeys = KEYS) -> list[dict[str, Any]]:
    rows = list(read_rows(path, keys))
    assert not [row for row in rows if isinstance(row, DataError)]
    return [row.data for row in rows if isinstance(row, Row)]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.just("user"), "content": TEXT}, optional={"name": TEXT}), min_size=1, max_size=3
)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": MESSAGES,
            "label": st.integers(-(2**63), 2**63 - 1),
            "metadata": st.fixed_dictionaries(
                {"x": st.floats(allow_nan=False, allow_infinity=False)},
                optional={"tags": st.lists(TEXT, max_size=2), "deep": st.fixed_dictionaries({"y": st.booleans()})},
            ),
            "unused": TEXT,
        }
    ),
    min_size=1,
    max_size=8,
)
BOUNDS = st.one_of(st.none(), st.integers(-10, 10))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, start=BOUNDS, stop=BOUNDS)
def test_parquet_gives_the_rows_of_jsonl(
    tmp_path: Path, rows: list[dict[str, Any]], start: int | None, stop: int | None
) -> None:
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet = write_parquet(tmp_path / "a.parquet", rows)
    part = f"@[{'' if start is None else start}:{'' if stop is None else stop}]"
    expected = rows[start:stop]
    assert datas(parquet + part) == expected
    assert datas(str(jsonl) + part) == expected
    assert json.dumps(datas(parquet + part), sort_keys=True) == json.dumps(expected, sort_keys=True), "same types, too"
    assert count_rows(parquet + part) == count_rows(str(jsonl) + part) == len(expected)


def test_parquet_types_that_json_lacks(tmp_path: Path) -> None:
    """Bytes, dates, decimals and maps are read; a struct loses its empty entries, and a row keeps its null."""
    rows: list[dict[str, Any]] = [
        {"prompt": b"caf\xc3\xa9", "label": Decimal("12.50"), "metadata": {"day": date(2024, 2, 29), "n": None}},
        {"prompt": b"b", "label": Decimal("7.00"), "metadata": None},
    ]
    maps = pyarrow.array([[("a", 1)], [("a", 2), ("b", 3)]], type=pyarrow.map_(pyarrow.string(), pyarrow.int8()))
    path = write_parquet(tmp_path / "a.parquet", rows, tools=maps)
    assert datas(path) == [
        {"prompt": "caf\u00e9", "label": 12.5, "metadata": {"day": "2024-02-29"}, "tools": {"a": 1}},
        {"prompt": "b", "label": 7, "metadata": None, "tools": {"a": 2, "b": 3}},
    ]


WRITTEN = [123.45, 0.1, -2.5, 72.0, 1e-05, 0.0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(pyarrow.float32(), WRITTEN), (pyarrow.float16(), [123.44, *WRITTEN[1:]]), (pyarrow.float64(), WRITTEN)],
)
def test_small_floats_are_read_as_written(tmp_path: Path, kind: pyarrow.DataType, expected: list[float]) -> None:
    """float32 stores 123.45 as 123.44999694824219, float16 as 123.4375: they read as 123.45 and 123.44."""
    inner = pyarrow.struct([("x", kind), ("y", pyarrow.large_list(kind))])
    nested = {
        "list": pyarrow.array([[each, None] for each in WRITTEN], pyarrow.list_(kind)),
        "fixed": pyarrow.array([[each] for each in WRITTEN], pyarrow.list_(kind, 1)),
        "inner": pyarrow.array([{"x": each, "y": [each]} for each in WRITTEN], inner),
        "map": pyarrow.array([[("x", each)] for each in WRITTEN], pyarrow.map_(pyarrow.string(), kind)),
        "float64": pyarrow.array(WRITTEN),
        "none": pyarrow.array([None] * len(WRITTEN), pyarrow.list_(kind)),
    }
    metadata = pyarrow.StructArray.from_arrays(list(nested.values()), list(nested))
    rows = [{"prompt": "a"}] * len(WRITTEN)
    path = write_parquet(tmp_path / "a.parquet", rows, label=pyarrow.array(WRITTEN, kind), metadata=metadata)
    assert [row["label"] for row in datas(path)] == expected
    assert [row["metadata"] for row in datas(path)] == [
        {
            "list": [each, None],
            "fixed": [each],
            "inner": {"x": each, "y": [each]},
            "map": {"x": each},
            "float64": written,
        }
        for each, written in zip(expected, WRITTEN, strict=True)
    ]


def test_unnamed_columns_never_refuse_a_row(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "label": 1, "note": None, "score": 1.5, "extra": {"level": 2}}, {"prompt": "b", "label": 2}]
    images = pyarrow.array([b"\xff", b"\xfe"])
    nested = pyarrow.array([[{"bytes": b"\xff"}], None])
    scores = pyarrow.array([math.nan, math.inf])
    far = pyarrow.array([10**9, 0], pyarrow.date32())  # Python has no such year
    path = write_parquet(tmp_path / "a.parquet", rows, images=images, nested=nested, scores=scores, far=far)
    first, second = datas(path)
    expected = {"prompt": "a", "label": 1, "note": None, "score": 1.5, "extra": {"level": 2}}
    assert first == expected | {"scores": None, "far": None}
    assert (second["scores"], second["extra"], second["far"]) == (None, None, "1970-01-01")
    assert check_rows(path, KEYS, chat_template=False) == []
    [problem, _] = check_rows(path, replace(KEYS, label_key="scores"), chat_template=False)
    assert problem.rule == "'scores' is nan, not text or a number"


def test_repeated_columns_are_refused_only_where_named(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    columns = {"prompt": ["a"], "label": ["1"], "x": [1], "y": [2]}
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table.rename_columns(["prompt", "label", "x", "x"]), path)
    assert datas(path) == [{"prompt": "a", "label": "1"}]
    pyarrow.parquet.write_table(table.rename_columns(["prompt", "label", "label", "y"]), path)
    [problem] = check_rows(path, KEYS, chat_template=False)
    assert problem.rule == "two columns are called 'label'"


def test_large_row_groups_are_read_in_parts(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    numbers = list(range(10_000))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"] * 10_000, "label": numbers, "more": numbers}), path)
    rows = datas(f"{path}@[100:9900]")
    assert [(row["label"], row["more"]) for row in rows] == [(number, number) for number in range(100, 9900)]


def test_bad_small_float_labels_name_the_row(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}] * 4
    labels = pyarrow.array([16777215.0, 123456789.0, math.nan, -math.inf], pyarrow.float32())
    problems = check_rows(write_parquet(tmp_path / "a.parquet", rows, label=labels), KEYS, chat_template=False)
    assert [problem.where.rpartition(":")[2] for problem in problems] == ["row 1", "row 2", "row 3"]
    assert problems[0].rule == "'label' is 123456790.0: its column cannot represent all integers from 16777216 on"
    assert problems[1].rule == "'label' is nan, not text or a number"
    metadata = pyarrow.array(
        [{"x": [1.5]}, {"x": [math.inf]}] * 2, pyarrow.struct([("x", pyarrow.list_(pyarrow.float16()))])
    )
    path = write_parquet(tmp_path / "b.parquet", rows, label=pyarrow.array(["1"] * 4), metadata=metadata)
    problems = check_rows(path, KEYS, chat_template=False)
    assert [problem.where.rpartition(":")[2] for problem in problems] == ["row 1", "row 3"]
    assert problems[0].rule == "a number is inf, which JSON cannot write"


def test_faults_of_parquet_name_the_row(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "label": 1.0}] * 4 + [{"prompt": "a", "label": float("nan")}, {"prompt": "", "label": 1.0}]
    path = write_parquet(tmp_path / "a.parquet", rows)
    first, second = check_rows(f"{path}@[1:]", KEYS, chat_template=False)
    assert (first.where, first.rule) == (f"{path}:row 4", "'label' is nan, not text or a number")
    assert (second.where, second.rule) == (f"{path}:row 5", "'prompt' is empty")
    assert check_rows(f"{path}@[:4]", KEYS, chat_template=False) == []
    binary = write_parquet(tmp_path / "b.parquet", [{"prompt": b"\xff", "label": 1}])
    [problem] = check_rows(binary, KEYS, chat_template=False)
    assert problem.where == f"{binary}:row 0"
    assert "can't decode" in problem.rule


def test_parquet_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"prompt": "a", "answer": 1}])
    [problem] = check_rows(path, KEYS, chat_template=False)
    assert str(problem) == f"{path}: no column 'label'; it has prompt, answer; correct --label-key"
    json_file = tmp_path / "b.parquet"
    json_file.write_text(json.dumps(MESSAGE))
    [problem] = check_rows(str(json_file), KEYS, chat_template=False)
    assert "cannot be read (Parquet magic bytes not found" in problem.rule
    whole = Path(path).read_bytes()
    broken = tmp_path / "c.parquet"
    broken.write_bytes(b"PAR1" + b"\0" * 60 + whole[64:])
    [problem] = check_rows(str(broken), WITHOUT_LABEL, chat_template=False)
    assert problem.where == f"{broken}, rows 0 to 0"


def test_eval_sets(run: Run) -> None:
    config = run.directory / "eval.yaml"
    config.write_text(
        f"datasets:\n- {{name: greedy, path: {run.data}, temperature: 0, eval-top-p: 0.5}}\n"
        f"- {{name: b, path: {run.data}}}\n"
    )
    args = run.args("--eval-interval", "1", "--eval-config", str(config), "--eval-prompt-data", f"{run.data}@[0:1]")
    plain, greedy, other = eval_datasets(args)
    assert (plain.name, plain.path, plain.max_response_len) == ("train", f"{run.data}@[0:1]", 40)
    assert (greedy.temperature, greedy.top_p, other.temperature, other.top_p) == (0, 0.5, 1, 1)
    assert (greedy.label_key, greedy.rm_type) == ("label", "deepscaler")
    for pattern, name in (
        ("sums/*.jsonl", "sums"),
        ("sums/**/*.jsonl", "sums"),
        ("*.jsonl", "eval"),
        ("a.b.jsonl", "a.b"),
    ):
        assert [each.name for each in eval_datasets(replace(args, eval_prompt_data=(pattern,), eval_config=None))] == [
            name
        ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: []", "has no list `datasets`"),
        ("datasets: [{name: a}]", "a set has no path"),
        ("datasets: [{name: a, path: []}]", "path is [], which is not a text"),
        ("datasets: [{name: a, path: [b, [c]]}]", "path is ['b', ['c']], which is not a text"),
        ("datasets: [{name: [a], path: b}]", "name is ['a'], which is not a text"),
        ("datasets: [{name: a, path: b, tempratur: 1}]", "unknown keys ['tempratur']"),
        ("datasets: [{name: a, path: b, temperature: hot}]", "a: temperature is hot; a value must be a number"),
        ("datasets: [{name: a, path: b, top_p: .inf}]", "a: top_p is .inf; a value must be a number"),
        ("datasets: [{name: a, path: b, top-p: null, failed-as: no}]", "a: failed_as is False; a value must be text"),
        ("datasets: [{name: a, path: b, failed_as: lost}]", "a value must be one of wrong, excluded"),
        ("datasets: [{name: a, path: b, name: c}]", "cannot be read (the key 'name' is repeated, line 1)"),
        ("datasets: [{name: a, path: b}]\ndatasets: []", "cannot be read (the key 'datasets' is repeated, line 2)"),
        ("datasets: [{name: a, path: b, top_p: 1, top-p: 1}]", "top_p and top-p are spellings of the same key"),
        (
            "datasets: [{name: a, path: b, top_p: 1, eval-top-p: 1}]",
            "top_p and eval-top-p are spellings of the same key",
        ),
        ("datasets: [{name: a, path: b, <<: {top-k: 1}, eval_top_k: 1}]", "top-k and eval_top_k are spellings"),
        ("datasets: [{name: a, path: b}, {name: a, path: c}]", "two evaluation sets have the same name"),
        ("datasets: [", "cannot be read"),
    ],
)
def test_bad_eval_config(run: Run, text: str, message: str) -> None:
    config = run.directory / "eval.yaml"
    config.write_text(text)
    error = run.error("--eval-interval", "1", "--eval-config", str(config))
    assert message in error
    assert error.count(str(config)) <= 1


def test_a_bad_slice_is_reported_once(run: Run) -> None:
    assert run.error("--prompt-data", f"{run.data}@[5]") == (
        f"--prompt-data {run.data}@[5]: [5] is not a slice; write path@[start:stop], where both may be left out"
    )


def test_labels_are_what_a_judge_can_read() -> None:
    for label, text in [
        ("34", "34"),
        (34, "34"),
        (-0.5, "-0.5"),
        (1e-05, "0.00001"),
        (2.0**51 + 0.5, "2251799813685248.5"),
    ]:
        assert label_text(label) == text


DEEP = "[" * 150 + "]" * 150


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f'{{"prompt": "a", "metadata": {{"x": {DEEP}}}}}', "nested more than 100 deep"),
        (f'{{"prompt": "a", "metadata": {{"x": {"[" * 100_000}}}}}', "not JSON"),
        (f'{{"prompt": "a", "metadata": {{"x": {2**64}}}}}', "more than 64 bits"),
        (f'{{"prompt": "a", "metadata": {{"x": {"9" * 5000}}}}}', "not JSON|more than 64 bits"),
        ('{"prompt": "a", "metadata": {"x": NaN}}', "not JSON"),
        ('{"prompt": "a", "metadata": {"x": -Infinity}}', "not JSON"),
        ('{"prompt": "a", "metadata": {"x": 1e999}}', "not JSON|a number is inf"),
        ('{"prompt": "a\\u0000b"}', "NUL character"),
        ('{"prompt": "a", "metadata": {"a\\u0000b": 1}}', "NUL character"),
        ('{"prompt": "a\\ud800b"}', "not JSON|surrogate"),
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is repeated"),
        ('{"prompt": "a", "pr\\u006fmpt": "b"}', "the key 'prompt' is repeated"),
    ],
)
def test_values_that_would_fail_later_are_named(tmp_path: Path, line: str, message: str) -> None:
    good = (
        '{"prompt": "a \\u00e9 \\ud83d\\ude00", "metadata": {"x": 1.2345678901234567, "prompt": 18446744073709551615}}'
    )
    file = tmp_path / "a.jsonl"
    file.write_text(f"{good}\n{line}\n{good}\n")
    [problem] = check_rows(str(file), WITHOUT_LABEL, chat_template=False)
    assert problem.where == f"{file}:2"
    assert re.search(message, problem.rule), problem.rule


@pytest.mark.parametrize(
    ("content", "where", "message"),
    [
        (b"\x1f\x8b\x08\x00" + b"\n{" * 50, "", "compressed with gzip"),
        ("{}".encode("utf-16"), "", "text in UTF-16"),
        (b"PAR1" + b"\0" * 50, "", "a parquet file"),
        (b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', ":2", "not JSON"),
        (b'{"prompt": "a"}\n{"prompt": "' + b"x" * MAX_LINE + b'"}\n', ":2", "longer than 32 MiB"),
    ],
)
def test_files_of_other_bytes_give_one_error(tmp_path: Path, content: bytes, where: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    [problem] = check_rows(str(file), WITHOUT_LABEL, chat_template=False)
    assert problem.where == f"{file}{where}"
    assert message in problem.rule


def test_files_that_other_systems_write_are_read(tmp_path: Path) -> None:
    """A byte order mark, CRLF, blank lines, and a last line without an end."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}')
    assert datas(str(file)) == [{"prompt": "a"}, {"prompt": "b"}]


def test_a_parquet_value_outside_python_names_its_row(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    dates = pyarrow.array([0, 2**62], pyarrow.timestamp("ms"))
    path = write_parquet(tmp_path / "a.parquet", rows, label=dates)
    [problem] = check_rows(path, KEYS, chat_template=False)
    assert problem.where == f"{path}:row 1"
