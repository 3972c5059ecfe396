"""Prompt files line by line, slices, and the evaluation sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from config_run import MESSAGE, Run

from slime.config.data_files import check_jsonl, split_slice
from slime.config.eval_data import eval_datasets


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
        (json.dumps(MESSAGE | {"prompt": "text"}), "'prompt' is not a list of OpenAI messages"),
        (json.dumps(MESSAGE | {"prompt": []}), "'prompt' is not a list of OpenAI messages"),
        (json.dumps(MESSAGE | {"prompt": [{"content": "x"}]}), "'prompt' is not a list of OpenAI messages"),
    ],
)
def test_faults(tmp_path: Path, line: str, fault: str) -> None:
    file = tmp_path / "a.jsonl"
    good = json.dumps(MESSAGE | {"more": 1})
    file.write_text(f"{good}\n\n{line}\n{good}\n")
    [problem] = check_jsonl(str(file), "prompt", "label", chat_template=True)
    assert problem.where == f"{file}:3"
    assert problem.rule.startswith(fault)
    assert check_jsonl(f"{file}@[0:1]", "prompt", "label", chat_template=True) == []


def test_messages_need_the_template(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(MESSAGE))
    [problem] = check_jsonl(str(file), "prompt", chat_template=False)
    assert problem.remedy == "for OpenAI messages, add --apply-chat-template"


def test_many_faults_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("x\n" * 12)
    problems = check_jsonl(str(file), "prompt", chat_template=True)
    assert len(problems) == 6
    assert problems[-1].rule == "7 more lines of 12 cannot be used"


def test_an_empty_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n")
    [problem] = check_jsonl(str(file), "prompt", chat_template=True)
    assert problem.rule == "holds no prompts"


def test_eval_sets(run: Run) -> None:
    config = run.directory / "eval.yaml"
    config.write_text(
        f"datasets:\n- {{name: greedy, path: {run.data}, temperature: 0, eval_top_p: 0.5}}\n"
        f"- {{name: b, path: {run.data}}}\n"
    )
    args = run.args("--eval-interval", "1", "--eval-config", str(config), "--eval-prompt-data", f"{run.data}@[0:1]")
    plain, greedy, other = eval_datasets(args)
    assert (plain.name, plain.path, plain.max_response_len) == ("train", f"{run.data}@[0:1]", 40)
    assert (greedy.temperature, greedy.top_p, other.temperature, other.top_p) == (0, 0.5, 1, 1)
    assert (greedy.label_key, greedy.rm_type) == ("label", "deepscaler")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: []", "has no list `datasets`"),
        ("datasets: [{name: a}]", "a set without path"),
        ("datasets: [{name: a, path: b, tempratur: 1}]", "unknown keys ['tempratur']"),
        ("datasets: [{name: a, path: b, temperature: hot}]", "a value has to be a number"),
        ("datasets: [{name: a, path: b}, {name: a, path: c}]", "two evaluation sets of one name"),
        ("datasets: [", "cannot be read"),
    ],
)
def test_bad_eval_config(run: Run, text: str, message: str) -> None:
    config = run.directory / "eval.yaml"
    config.write_text(text)
    assert message in run.error("--eval-interval", "1", "--eval-config", str(config))
