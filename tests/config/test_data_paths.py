"""Lists, patterns and slices of data files, and words that name none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from config_run import MESSAGE, Run

from slime.config.data_paths import data_paths
from slime.config.epochs import planned_prompts
from slime.config.eval_data import eval_datasets


def test_patterns_are_sorted_and_words_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "x[1].jsonl", "d.parquet"):
        (tmp_path / name).touch()
    root = str(tmp_path)

    def names(*words: str) -> list[str]:
        return [path.removeprefix(f"{root}/") for path in data_paths([f"{root}/{word}" for word in words])]

    assert names("b.jsonl", "a.jsonl@[1:2]") == ["b.jsonl", "a.jsonl@[1:2]"]
    assert names("d.parquet", "[ab].jsonl@[:5]") == ["d.parquet", "a.jsonl@[:5]", "b.jsonl@[:5]"]
    assert names("**/*.jsonl") == ["a.jsonl", "b.jsonl", "sub/c.jsonl", "x[1].jsonl"]
    assert names("x[1].jsonl") == ["x[1].jsonl"]
    assert data_paths(f"{root}/missing.jsonl") == [f"{root}/missing.jsonl"]


def test_a_run_counts_and_checks_all_files(run: Run) -> None:
    more = run.directory / "more.jsonl"
    more.write_text(f"{json.dumps(MESSAGE)}\n" * 3)
    words = ("--prompt-data", str(run.data), f"{more}@[1:]")
    args = run.args(*words)
    assert args.prompt_data == words[1:]
    assert planned_prompts(args) == 3
    assert run.args("--prompt-data", str(run.data)).prompt_data == str(run.data)
    more.write_text(f"{json.dumps(MESSAGE)}\n" * 2 + "{}")
    assert run.error(*words).startswith(f"{more}:3: no key 'prompt'")
    more.write_text("")
    assert run.error(*words) == f"{more}@[1:]: has no rows; add rows, or name another file or slice"


@pytest.mark.parametrize(
    ("word", "rule", "remedy"),
    [
        ("openai/gsm8k", "are not downloaded", "hf download --repo-type dataset openai/gsm8k --local-dir gsm8k, then"),
        ("hf:openai/gsm8k:main/train", "are not downloaded", "hf download --repo-type dataset openai/gsm8k --local"),
        ("HERE", "HERE: is a directory", "name its files, for example with the pattern 'HERE/**/*.jsonl'"),
        ("HERE/*.parquet", "no file matches", "** matches folders of any depth"),
        ("HERE/train.jsonl:0.3", "weights have a flag of their own", "write HERE/train.jsonl, and the weights"),
        ("HERE/missing.jsonl", "there is no file HERE/missing.jsonl", "name a jsonl or parquet file"),
    ],
)
def test_words_that_name_no_file(run: Run, word: str, rule: str, remedy: str) -> None:
    here = str(run.directory)
    word, rule, remedy = (text.replace("HERE", here) for text in (word, rule, remedy))
    for flag in ("--prompt-data", "--eval-prompt-data"):
        words = [flag, word] if flag == "--prompt-data" else ["--eval-interval", "1", flag, "name", word]
        error = run.error(*words)
        assert error.startswith(flag)
        assert rule in error
        assert remedy in error
        [warning] = [text for text in run.warnings("--dry-run", *words) if text.startswith(flag)]
        assert remedy in warning


def test_an_evaluation_set_may_have_several_files(run: Run) -> None:
    config = run.directory / "eval.yaml"
    bad = run.directory / "bad.jsonl"
    bad.write_text("{}")
    config.write_text(f"datasets: [{{name: a, path: [{run.data}, '{run.directory}/b*.jsonl']}}]")
    words = ("--eval-interval", "1", "--eval-config", str(config))
    assert run.error(*words).startswith(f"{bad}:1: no key 'prompt'")
    bad.write_text(json.dumps(MESSAGE))
    [dataset] = eval_datasets(run.args(*words))
    assert dataset.path == (str(run.data), f"{run.directory}/b*.jsonl")


def test_no_files_are_no_value(run: Run) -> None:
    config = run.directory / "run.yaml"
    config.write_text("prompt_data: []")
    run.base = [word for word in run.base if word not in ("--prompt-data", str(run.data))]
    assert "prompt_data" in run.errors("--config", str(config))[0]
