"""The layouts in which users of other frameworks have their data give the same prompts, labels and rewards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.config.data_rows import DataKeys
from slime.config.prompt_format import PromptFormat
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.prompts import Prompt, load_prompts
from slime.rollout.rewards.reward import find_reward
from tests.saved_state import through_a_file

Write = Callable[..., str]
PROBLEMS = [("What is 17 * 3?", "17 * 3 = <<17*3=51>>51\n#### 51"), ("Half of 3?", "3/2\n#### 1.5"), ("2?", "#### 2")]
RESPONSES = ["So \\boxed{51}", "So \\boxed{\\frac{3}{2}}", "So \\boxed{3}"]


def _load(path: str, tokenizer: PreTrainedTokenizerFast, **flags: Any) -> list[Prompt]:
    args = Args(**{"apply_chat_template": True, **flags})
    keys = DataKeys.of(args, input_key=args.resolved.input_key, label_key=args.label_key)
    return load_prompts(path, args, tokenizer, keys, longest=None).prompts


def _rewards(prompts: list[Prompt]) -> list[float]:
    rewards: list[float] = []
    for number, (prompt, response) in enumerate(zip(prompts, RESPONSES, strict=True)):
        sample = prompt.to_sample(group_index=number, index=number)
        sample.response = response
        reward: Any = find_reward("math")(Args(rm_type="math"), sample)
        rewards.append(reward)
    return rewards


def _messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_struct_array(pyarrow.array(rows)), path)
    return str(path)


def test_four_layouts_give_the_same_rewards(
    tmp_path: Path, data_file: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    strings = data_file([{"question": q, "answer": a} for q, a in PROBLEMS], "strings.jsonl")
    messages = data_file([{"prompt": _messages(q), "label": a} for q, a in PROBLEMS], "messages.jsonl")
    verl = _parquet(
        tmp_path / "verl.parquet",
        [
            {
                "data_source": "openai/gsm8k",
                "prompt": _messages(q),
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": a.rpartition("#### ")[2]},
                "extra_info": {"answer": a, "index": number, "split": "train"},
            }
            for number, (q, a) in enumerate(PROBLEMS)
        ],
    )
    trl = _parquet(tmp_path / "trl.parquet", [{"prompt": _messages(q), "solution": a} for q, a in PROBLEMS])
    loaded = [
        _load(strings, tokenizer, input_key="question", label_key="answer"),
        _load(messages, tokenizer, label_key="label"),
        _load(verl, tokenizer, label_key="reward_model.ground_truth", metadata_key="extra_info"),
        _load(trl, tokenizer, label_key="solution"),
    ]
    assert [_rewards(prompts) for prompts in loaded] == [[1.0, 1.0, 0.0]] * 4
    tokens = [[prompt.tokens for prompt in prompts] for prompts in loaded]
    assert tokens == [tokens[0]] * 4
    assert "What is 17 * 3?<|assistant|>" in tokenizer.decode(tokens[0][0])
    assert [[prompt.prompt for prompt in prompts] for prompts in loaded] == [[_messages(q) for q, _ in PROBLEMS]] * 4
    assert [[prompt.label for prompt in loaded[number]] for number in (0, 1, 3)] == [[a for _, a in PROBLEMS]] * 3
    assert loaded[2][0].metadata["split"] == "train"
    wrong = _load(verl, tokenizer, label_key="extra_info.index")
    assert _rewards(wrong) == [0.0, 0.0, 0.0], "the control: another column gives other rewards"


def test_rewards_see_every_column(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "q", "label": "5", "metadata": {"a": 1}, "unit": "km", "steps": [1, {"n": 2}], "none": None}
    args = Args(prompt_data=data_file([row]), label_key="label", n_samples_per_prompt=2)
    [first, second] = DataBuffer(args, tokenizer).get_groups(1, rollout_id=0)[0]
    assert first.row == row
    assert first.row is second.row is first.copy().row is first.to_bare_prompt().row is first.to_failed("x").row
    assert first.metadata == {"a": 1}
    buffer = DataBuffer(args, tokenizer)
    buffer.add_groups([[first, second]])
    state = through_a_file(buffer.state_dict())
    again = DataBuffer(args, tokenizer)
    again.load_state_dict(state)
    assert again.get_groups(1, rollout_id=0)[0][1].row == row


def test_the_system_prompt_comes_first(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    own = [{"role": "system", "content": "own"}, *_messages("b")]
    path = data_file([{"prompt": "a"}, {"prompt": _messages("b")}, {"prompt": own}])
    prompts = _load(path, tokenizer, system_prompt="ours")
    system = {"role": "system", "content": "ours"}
    assert [prompt.prompt for prompt in prompts] == [[system, *_messages("a")], [system, *_messages("b")], own]
    assert "<|system|>\nours<|user|>\na" in tokenizer.decode(prompts[0].tokens)
    assert _load(path, tokenizer)[2].tokens == prompts[2].tokens
    [plain, *_] = _load(data_file([{"prompt": "a"}], "plain.jsonl"), tokenizer, apply_chat_template=False)
    assert (plain.prompt, tokenizer.decode(plain.tokens)) == ("a", "a")


def test_the_template_gets_its_variables(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        chat_template="{{ messages[0].content }}{% if enable_thinking is false %}!{% endif %}",
    )
    path = data_file([{"prompt": "a"}])
    assert [prompt.tokens for prompt in _load(path, other)] == [other("a")["input_ids"]]
    [off] = _load(path, other, apply_chat_template_kwargs='{"enable_thinking": false}')
    assert off.tokens == other("a!")["input_ids"]
    form = PromptFormat(chat_template=True, template_kwargs={"enable_thinking": False})
    keys = DataKeys(input_key="prompt", label_key=None, metadata_key="metadata", tool_key=None)
    assert load_prompts(path, Args(), other, keys, longest=None, form=form).prompts == [off]


def test_several_files_are_one_set_in_order(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    first = data_file([{"prompt": f"a{number}"} for number in range(4)], "a.jsonl")
    second = data_file([{"prompt": f"b{number}"} for number in range(2)], "b.jsonl")

    def buffer(*paths: str, **flags: Any) -> DataBuffer:
        return DataBuffer(Args(prompt_data=paths, rollout_shuffle=True, n_samples_per_prompt=1, **flags), tokenizer)

    def drawn(source: DataBuffer, count: int) -> list[Any]:
        return [group[0].prompt for group in source.get_groups(count, rollout_id=0)]

    whole = buffer(f"{first}@[1:]", second)
    order = drawn(whole, 10)
    assert sorted(order[:5]) == ["a1", "a2", "a3", "b0", "b1"]
    started = buffer(f"{first}@[1:]", second)
    assert drawn(started, 3) == order[:3]
    state = through_a_file(started.state_dict())
    resumed = buffer(f"{first}@[1:]", second)
    resumed.load_state_dict(state)
    assert drawn(resumed, 7) == order[3:]
    for changed in ((second, f"{first}@[1:]"), (f"{first}@[1:]",), (f"{first}@[1:]", f"{second}@[:1]")):
        with pytest.raises(ValueError, match=r"--prompt-data .*sha256 of the data"):
            buffer(*changed).load_state_dict(state)


def test_a_changed_column_is_noticed_on_resume(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    def source(unit: str) -> DataBuffer:
        return DataBuffer(Args(prompt_data=data_file([{"prompt": "a", "unit": unit}], f"{unit}.jsonl")), tokenizer)

    state = source("km").state_dict()
    with pytest.raises(ValueError, match="sha256 of the other columns"):
        source("miles").load_state_dict(state)
    del state["data"]["sha256 of the other columns"]  # as in a checkpoint of an older version
    source("miles").load_state_dict(state)


def test_dropped_prompts_of_several_files_are_named(
    data_file: Write, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [data_file([{"prompt": "a"}, {"prompt": "a" * 99}], name) for name in ("a.jsonl", "b.jsonl")]
    keys = DataKeys(input_key="prompt", label_key=None, metadata_key="metadata", tool_key=None)
    kept = load_prompts(paths, Args(), tokenizer, keys, longest=9).prompts
    assert [prompt.prompt for prompt in kept] == ["a", "a"]
    assert "2 of 4 prompts left out" in caplog.text
    assert f"{paths[0]}:2, {paths[1]}:2" in caplog.text
