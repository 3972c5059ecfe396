"""System prompts and template variables, for the training set and for each evaluation set."""

from __future__ import annotations

import json

import pytest
from config_run import MESSAGE, Run

from slime.config.args_yaml import dump_args
from slime.config.eval_data import eval_datasets

KWARGS = "--apply-chat-template-kwargs"


def _template(run: Run, text: str) -> None:
    (run.hf / "chat_template.jinja").write_text(text)


def test_variables_are_one_json_object(run: Run) -> None:
    _template(run, "{{ messages }}{{ enable_thinking }}{{ budget }}")
    args = run.args(KWARGS, '{"enable_thinking":false, "budget": 2}')
    config = run.directory / "run.yaml"
    config.write_text("apply_chat_template_kwargs: {enable_thinking: false, budget: 2}")
    assert run.args("--config", str(config)).apply_chat_template_kwargs == args.apply_chat_template_kwargs
    config.write_text(dump_args(args))
    assert run.args("--config", str(config)).apply_chat_template_kwargs == '{"enable_thinking": false, "budget": 2}'
    assert run.warnings(KWARGS, '{"enable_thinking": false}') == run.warnings()


@pytest.mark.parametrize("text", ["enable_thinking=false", "[1]", "{", '{"a": NaN}', "null"])
def test_text_that_is_no_json_object(run: Run, text: str) -> None:
    assert f"{KWARGS} {text}: must be a JSON object" in run.error(KWARGS, text)


@pytest.mark.parametrize(
    ("name", "rule"),
    [("add_generation_prompt", "slime sets it"), ("tools", "use --tool-key"), ("max_length", "of the tokenizer")],
)
def test_variables_that_slime_sets(run: Run, name: str, rule: str) -> None:
    assert rule in run.error(KWARGS, json.dumps({name: 1}))


def test_a_variable_that_no_template_reads(run: Run) -> None:
    _template(run, "{{ messages }}{{ enable_thinking }}")
    [warning] = set(run.warnings(KWARGS, '{"enable_thinkin": false}')) - set(run.warnings())
    assert "no effect: the model's chat template does not read enable_thinkin" in warning


def test_both_flags_need_the_template(run: Run) -> None:
    run.data.write_text(json.dumps({"prompt": "1 + 1 = ?", "label": "2"}))
    warnings = run.warnings("--no-apply-chat-template", "--system-prompt", "Think.", KWARGS, '{"x": 1}')
    text = "\n".join(warnings)
    assert "--system-prompt Think.: no effect: without --apply-chat-template a prompt has no messages" in text
    assert f'{KWARGS} {{"x": 1}}: no effect: without --apply-chat-template no template is rendered' in text


def test_each_evaluation_set_has_its_own_form(run: Run) -> None:
    strings = run.directory / "strings.jsonl"
    strings.write_text(json.dumps({"question": "1 + 1 = ?", "answer": {"text": "#### 2"}}))
    config = run.directory / "eval.yaml"
    config.write_text(
        f"datasets:\n- {{name: plain, path: {strings}, apply_chat_template: false, input_key: question, "
        "label_key: answer.text, system_prompt: null, apply_chat_template_kwargs: {a: 1}, metadata_key: answer}\n"
        f"- {{name: same, path: {run.data}}}\n"
    )
    _template(run, "{{ messages }}{{ a }}")
    args = run.args("--eval-interval", "1", "--eval-config", str(config), "--system-prompt", "Think.")
    plain, same = eval_datasets(args)
    assert (plain.apply_chat_template, plain.system_prompt) == (False, None)
    assert (plain.keys.input_key, plain.keys.label_key, plain.keys.metadata_key) == (
        "question",
        "answer.text",
        "answer",
    )
    assert plain.apply_chat_template_kwargs == '{"a": 1}'
    assert (same.apply_chat_template, same.system_prompt, same.apply_chat_template_kwargs) == (True, "Think.", None)
    strings.write_text(json.dumps({"question": MESSAGE["prompt"], "answer": {"text": "2"}}))
    error = run.error("--eval-interval", "1", "--eval-config", str(config))
    assert error.startswith(f"{strings}:1: 'question' is not text")


def test_an_evaluation_set_alone_needs_the_template(run: Run) -> None:
    run.data.write_text(json.dumps({"prompt": "1 + 1 = ?", "label": "2"}))
    (run.hf / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    config = run.directory / "eval.yaml"
    config.write_text(f"datasets: [{{name: a, path: {run.data}, apply_chat_template: true}}]")
    words = ("--no-apply-chat-template", "--eval-interval", "1", "--eval-config", str(config))
    assert "there is no chat template" in run.error(*words)
