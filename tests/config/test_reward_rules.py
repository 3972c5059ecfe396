"""Rules for rewards: a missing reward, label or URL is found before anything starts."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from config_run import MESSAGE, Run

from slime.config.reward_types import REWARD_TYPES, facts_of, may_have_label
from slime.plan.summary import format_plan

URL = ["--rm-url", "http://127.0.0.1:9000/judge"]


def _without(run: Run, flag: str) -> None:
    at = run.base.index(flag)
    del run.base[at : at + 2]


def _lines(run: Run, *metadata: dict[str, Any] | None) -> None:
    rows = [MESSAGE if entry is None else {**MESSAGE, "metadata": entry} for entry in metadata]
    run.data.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("prefix", ["", "boxed_"])
@pytest.mark.parametrize("rm_type", REWARD_TYPES)
def test_every_type_runs(run: Run, rm_type: str, prefix: str) -> None:
    url = URL if rm_type == "remote_rm" else []
    if label := {"gpqa": "B", "code": "assert add(1, 1) == 2"}.get(rm_type):
        run.data.write_text(json.dumps(MESSAGE | {"label": label}) + "\n")
    words = ["--rm-type", prefix + rm_type, "--eval-rm-type", prefix + rm_type, "--eval-prompt-data", str(run.data)]
    assert run.load(*words, *url)[1] == []
    _without(run, "--label-key")
    assert run.args(*words, *url).label_key == ("label" if may_have_label(prefix + rm_type) else None), (
        "the data have it"
    )


def test_unknown_reward_types_are_refused(run: Run) -> None:
    for name in ("boxed_", "boxed_boxed_math", "Math", "accuracy"):
        assert facts_of(name) is None
        assert run.error("--rm-type", name).startswith(
            f"--rm-type {name}: unknown reward type; one of deepscaler, dapo"
        )
    words = ["--eval-prompt-data", str(run.data), "--eval-rm-type", "accuracy"]
    assert run.error(*words).startswith("--eval-rm-type accuracy: unknown reward type")
    file = run.directory / "eval.yaml"
    file.write_text(f"datasets: [{{name: a, path: {run.data}, rm_type: accuracy}}, {{name: b, path: {run.data}}}]")
    error = run.error("--eval-config", str(file))
    assert error.startswith(f"--eval-config {file}: a: rm_type 'accuracy' is unknown; one of deepscaler")
    assert run.errors("--eval-config", str(file), "--dry-run") == [error]


@pytest.fixture
def own(run: Run, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a module with a reward for one sample and one for a group."""
    (run.directory / "own_rewards_here.py").write_text(
        "def reward(args, sample): return 1.0\ndef group(args, samples, **kwargs): return [1.0] * len(samples)\n"
    )
    monkeypatch.syspath_prepend(run.directory)
    monkeypatch.delitem(sys.modules, "own_rewards_here", raising=False)
    return "own_rewards_here"


def test_a_lines_own_type(run: Run, own: str) -> None:
    _lines(run, {"rm_type": "math"}, None, {"rm_type": "accuracy"}, {"rm_type": 5}, {"rm_type": None})
    errors = run.errors()
    assert [error.partition(": ")[0] for error in errors] == [f"{run.data}:3", f"{run.data}:4"]
    assert "metadata.rm_type 'accuracy' is unknown; one of deepscaler" in errors[0]
    _without(run, "--rm-type")
    _lines(run, {"rm_type": "random"}, None)
    assert run.error() == (
        f"{run.data}:2: it has no reward type; give it metadata.rm_type, or add --rm-type or --custom-rm-path"
    )
    _lines(run, {"rm_type": "boxed_f1"})
    assert run.errors() == []
    _without(run, "--label-key")
    assert "metadata.rm_type is 'boxed_f1', which compares the answer with a label; add --label-key" in run.error()
    _lines(run, {"rm_type": "remote_rm"})
    assert run.error() == f"{run.data}:1: metadata.rm_type is 'remote_rm', but there is no --rm-url; add --rm-url"
    assert run.errors(*URL) == []
    assert "metadata.rm_type is 'remote_rm', but there is no --rm-url" in run.error("--dry-run")
    assert run.errors("--custom-rm-path", f"{own}.reward") == []  # it judges every row


def test_an_empty_label_is_never_right(run: Run, own: str) -> None:
    rows = [MESSAGE, MESSAGE | {"label": " "}, MESSAGE | {"label": "", "metadata": {"rm_type": "f1"}}]
    run.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [error] = run.errors()
    assert error.startswith(f"{run.data}:2: its label is empty, and deepscaler compares the answer with it")
    assert run.errors("--custom-rm-path", f"{own}.reward") == []


def test_lines_of_an_evaluation_set(run: Run) -> None:
    held_out = run.directory / "held-out.jsonl"
    held_out.write_text(json.dumps({**MESSAGE, "metadata": {"rm_type": "accuracy"}}) + "\n")
    assert run.error("--eval-prompt-data", "a", str(held_out)).startswith(f"{held_out}:1: metadata.rm_type 'acc")


def test_a_remote_judge_has_an_address(run: Run) -> None:
    rule = "--rm-url: not given; remote_rm sends responses there to be judged; add --rm-url"
    assert run.error("--rm-type", "boxed_remote_rm").startswith(rule)
    evaluation = ["--eval-prompt-data", str(run.data), "--eval-rm-type", "remote_rm"]
    assert run.error(*evaluation).startswith(rule)
    assert run.errors(*evaluation, *URL) == []
    file = run.directory / "eval.yaml"
    file.write_text(f"datasets: [{{name: a, path: {run.data}, rm_type: remote_rm}}]")
    assert run.error("--eval-config", str(file)).startswith(rule)
    for url in ("127.0.0.1:9000", "ftp://judge", "http://", "http://judge:port", "http://[::1", "judge"):
        assert run.error("--rm-type", "remote_rm", "--rm-url", url).startswith(f"--rm-url {url}: is not a URL")
    for url in ("https://judge.example/v1?x=1", "http://[::1]:8000", "http://judge"):
        assert run.errors("--rm-type", "remote_rm", "--rm-url", url) == []


def test_flags_that_no_reward_reads(run: Run, own: str) -> None:
    assert "no effect: it belongs to --rm-type remote_rm" in run.warnings(*URL)[0]
    assert run.warnings("--rm-type", "remote_rm", "--rm-concurrency", "8", *URL) == []
    assert "no effect: built-in rewards judge each sample by itself" in run.warnings("--group-rm")[0]
    _without(run, "--rm-type")
    assert "no effect: --custom-rm-path judges" in run.warnings(*URL, "--custom-rm-path", f"{own}.reward")[0]
    one, group = ["--custom-rm-path", f"{own}.reward"], ["--custom-rm-path", f"{own}.group"]
    assert run.warnings(*one) == run.warnings(*group, "--group-rm") == []
    assert "takes `sample`, but --group-rm passes a list of samples" in run.warnings(*one, "--group-rm")[0]
    assert "takes `samples`, but receives one sample at a time" in run.warnings(*group)[0]


def test_each_reward_function_has_a_name_and_weight(run: Run, own: str) -> None:
    _without(run, "--rm-type")
    path = run.directory / "own_rewards_here.py"
    path.write_text(path.read_text() + "def short(args, sample): return 1.0\ndef sum(args, sample): return 1.0\n")
    both = ["--custom-rm-path", f"{own}.reward", f"{path}:short"]
    args, warnings = run.load(*both, "--reward-weights", "1", "-0.1")
    assert (args.reward_key, args.reward_weights, warnings) == ("sum", (1, -0.1), [])
    assert args.custom_rm_path == tuple(both[1:]) and args.reward_names == ("reward", "short")
    assert f"1 * {own}.reward + -0.1 * {path}:short" in format_plan(args, [])
    assert run.args(*both, "--reward-key", "score").reward_key == "score"
    assert "has 3 values, and --custom-rm-path has 2 functions" in run.error(*both, "--reward-weights", "1", "2", "3")
    assert "all weights are 0" in run.error(*both, "--reward-weights", "0", "0")
    assert "a number" in run.error(*both, "--reward-weights", "1", "nan")
    twice = [*both, f"{path}:short"]
    assert "2 functions are called short, the name under which" in run.error(*twice)
    named = [*both, f"{path}:sum"]
    assert "a function is called sum, the name under which the sum is stored" in run.error(*named)
    assert run.errors(*named, "--reward-key", "total") == []
    assert "there is one reward function, so there is no sum" in run.error(*both[:2], "--reward-weights", "1")
    assert run.args(*both[:2]).reward_key is None
    typed = ["--rm-type", "deepscaler", "--reward-weights", "1"]
    assert "no effect: it weighs the functions of --custom-rm-path" in str(run.warnings(*typed))
    assert f"{own}.none: " in run.error(*both, f"{own}.none")
    assert f"{own}.group: takes `samples`, but receives one sample" in run.warnings(*both, f"{own}.group")[0]
    assert "is not used" not in str(run.load(*both)[1])
    evaluation = ["--eval-prompt-data", str(run.data), "--eval-rm-type", "math"]
    assert f"--custom-rm-path {' '.join(both[1:])} also judges" in run.error(*both, *evaluation)


def _installed(run: Run, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Make this version the ANTLR runtime that importlib.metadata finds first."""
    found = run.directory / f"antlr4_python3_runtime-{version}.dist-info"
    found.mkdir()
    (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: antlr4-python3-runtime\nVersion: {version}\n")
    monkeypatch.syspath_prepend(run.directory)


def test_another_antlr_runtime_is_refused_for_mathematics(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.errors() == []
    _installed(run, monkeypatch, "4.9.3")
    rule = "antlr4-python3-runtime 4.9.3 is installed, but the comparison of answers was tested with 4.13.2"
    message = f"{rule}; pip install antlr4-python3-runtime==4.13.2"
    assert run.error() == f"--rm-type deepscaler: {message}"
    assert run.error("--rm-type", "boxed_dapo") == f"--rm-type boxed_dapo: {message}"
    assert run.errors("--rm-type", "f1") == []
    evaluation = ["--rm-type", "f1", "--eval-prompt-data", str(run.data), "--eval-rm-type", "math"]
    assert run.error(*evaluation) == f"--eval-rm-type math: {message}"


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ("prompts, completions, **kwargs", "completions, prompts"),
        ("completions, completion_ids=None", "completion_ids, completions"),
        ("data_source, solution_str", "data_source, solution_str"),
    ],
)
def test_rewards_of_other_trainers_are_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, parameters: str, named: str
) -> None:
    path = run.data.parent / "foreign_rewards.py"
    path.write_text(f"def f({parameters}): return [0.0]\ndef g(args, samples): return [0.0]\n")
    errors = run.errors("--custom-rm-path", f"{path}:f", "--group-rm")
    assert len(errors) == 1
    assert f"takes {named}, as the rewards of TRL or verl do; call it from a function (args, sample)" in errors[0]
    assert run.load("--custom-rm-path", f"{path}:g", "--group-rm"), "control"


def test_a_generate_function_may_judge(run: Run) -> None:
    """Control: without the function, both flags are warned of."""
    at = run.base.index("--rm-type")
    del run.base[at : at + 2]
    lines = [{**MESSAGE, "metadata": {"rm_type": "math"}}]
    run.data.write_text("".join(json.dumps(row) + "\n" for row in lines))
    words = ["--eval-prompt-data", "a", str(run.data)]
    assert len(run.load(*words)[1]) == 2
    hook = ["--custom-generate-function-path", "examples.tool_use.calculator.generate"]
    assert run.load(*words, *hook)[1] == []
