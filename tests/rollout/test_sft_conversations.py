"""Conversations become training rows: tokens, masks and weights, from every layout of a data file."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_styles import CALL, TOOLS, chat_tokenizer, make_tokenizer

from slime.config.args import SFT_ROLLOUT, Args
from slime.config.data_rows import DataKeys
from slime.config.prompt_format import PromptFormat
from slime.core.batch import from_samples
from slime.core.sample import Sample
from slime.rollout.context import RolloutContext, RolloutResult
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.reward_pool.pool import RewardPool
from slime.rollout.sft_rollout import fill, generate_rollout, num_trained
from slime.rollout.survey import survey

Write = Callable[..., str]
USER, MORE = {"role": "user", "content": "q"}, {"role": "user", "content": "b"}
FIRST, SECOND = {"role": "assistant", "content": "aa"}, {"role": "assistant", "content": "w"}
CHAT = PromptFormat(chat_template=True)
TALK = [USER, FIRST, MORE, SECOND]


def sft_args(path: str, **kwargs: Any) -> Args:
    defaults: dict[str, Any] = {
        "input_key": "messages",
        "apply_chat_template": True,
        "rollout_batch_size": 1,
        "rollout_function_path": SFT_ROLLOUT,
    }
    return Args(prompt_data=path, loss_type="sft_loss", **(defaults | kwargs))


def rollout(path: str, *, style: str = "roles", **kwargs: Any) -> RolloutResult:
    args, tokenizer = sft_args(path, **kwargs), chat_tokenizer(style)
    context = RolloutContext(args, None, tokenizer, RewardPool(args))
    return asyncio.run(generate_rollout(args, 0, DataBuffer(args, tokenizer), context))


def learned(sample: Sample, style: str = "roles") -> str:
    """Return the text of a sample with « and » around what is trained, and its weight if that is not 1."""
    tokenizer = chat_tokenizer(style)
    text, last = "", 0.0
    weights = [0.0] * sample.prompt_length + list(sample.loss_mask or [])
    for token, weight in zip(sample.tokens, weights, strict=True):
        marks = "" if weight == last else ("»" if last else "") + ("«" if weight else "")
        text += marks + (f"{weight:g}:" if marks and weight not in (0, 1) else "") + str(tokenizer.decode([token]))
        last = weight
    return text + ("»" if last else "")


def of_rows(data_file: Write, rows: Sequence[dict[str, Any]], **kwargs: Any) -> list[str]:
    result = rollout(data_file(list(rows)), rollout_batch_size=len(rows), **kwargs)
    return [learned(group[0], kwargs.get("style", "roles")) for group in result.groups]


ALL = "[gMASK]<sop><|user|>\nq<|assistant|>«\naa<|user|>»\nb<|assistant|>«\nw<|endoftext|>»"
LAST = "[gMASK]<sop><|user|>\nq<|assistant|>\naa<|user|>\nb<|assistant|>«\nw<|endoftext|>»"


def test_which_messages_are_trained(data_file: Write) -> None:
    weighted = [USER, FIRST | {"weight": 0.5}, MORE, SECOND]
    assert of_rows(data_file, [{"messages": TALK}]) == [ALL]
    assert of_rows(data_file, [{"messages": TALK}], sft_loss_on="last_assistant") == [LAST]
    assert of_rows(data_file, [{"messages": [USER, FIRST | {"weight": 0}, MORE, SECOND]}]) == [LAST]
    assert of_rows(data_file, [{"messages": [USER, FIRST, MORE, SECOND | {"weight": 0}]}]) == [
        "[gMASK]<sop><|user|>\nq<|assistant|>«\naa<|user|>»"
    ], "the row ends with its last trained token"
    assert of_rows(data_file, [{"messages": weighted}]) == [ALL.replace("«\naa", "«0.5:\naa")]


def test_prompt_and_completion_as_messages(data_file: Write) -> None:
    row = {"prompt": TALK[:3], "completion": TALK[3:]}
    keys = {"input_key": "prompt", "label_key": "completion"}
    assert of_rows(data_file, [row], **keys) == [LAST]
    assert of_rows(data_file, [{"prompt": TALK[:1], "completion": TALK[1:]}], **keys) == [ALL]
    assert of_rows(data_file, [{"prompt": "q", "completion": TALK[1:]}], **keys) == [ALL]
    assert of_rows(data_file, [row, {"prompt": [USER], "completion": "text"}], **keys) == [
        LAST,
        "[gMASK]<sop><|user|>\nq<|assistant|>«text<|endoftext|>»",
    ], "control: a text is appended as it is"


def test_tools_and_the_system_prompt(data_file: Write) -> None:
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    tool = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "4"}
    row = {"messages": [USER, calling, tool, SECOND], "tools": TOOLS}
    [text] = of_rows(data_file, [row], tool_key="tools", style="chatml", system_prompt="s")
    assert text.startswith('<|im_start|>system\ns\n{"type": "function"')
    assert text.endswith(
        '<|im_start|>assistant\n«<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>»\n'
        "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n«w<|im_end|>»"
    )


def test_a_batch_counts_trained_tokens(data_file: Write) -> None:
    result = rollout(data_file([{"messages": TALK}]))
    [[sample]] = result.groups
    assert sample.prompt_length + sample.response_length == len(sample.tokens)
    assert num_trained(sample) == len("\naa") + 1 + len("\nw") + 1 == result.metrics["rollout/trained_tokens"]
    assert sample.response_length == len("\naa") + 1 + len("\nb") + 1 + len("\nw") + 1
    batch = from_samples([sample])
    assert batch.columns["loss_mask"].sum() == num_trained(sample)
    assert sample.response == "\naa<|user|>\nb<|assistant|>\nw<|endoftext|>"
    assert Sample.from_dict(json.loads(json.dumps(sample.to_dict()))).loss_mask == sample.loss_mask


def test_the_first_token_is_predicted_by_nothing(data_file: Write) -> None:
    """A conversation that begins with the assistant, in a template without any header."""
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}</s>{% endfor %}", "</s>")
    sample = Sample(prompt=[FIRST | {"weight": 1}, USER, SECOND | {"weight": 1}])
    fill([sample], tokenizer, DataKeys.of(sft_args("none"), input_key="messages", label_key=None), CHAT)
    assert (sample.prompt_length, sample.loss_mask) == (1, [1, 1, 0, 0, 1, 1])
    assert sample.response == "a</s>q</s>w</s>"
    [text] = of_rows(data_file, [{"messages": [FIRST, USER, SECOND]}], style="chatml")
    assert text.count("«") == 2, "control: the header is predicted"


def test_a_conversation_that_is_too_long_is_counted(data_file: Write) -> None:
    path = data_file([{"messages": TALK}, {"messages": [USER, FIRST | {"content": "x" * 50}]}, {"messages": TALK}])
    result = rollout(path, rollout_batch_size=2, rollout_max_context_len=40)
    assert [group[0].group_index for group in result.groups] == [0, 2]
    assert result.metrics["rollout/groups_dropped/too_long"] == 1


def test_faults_of_a_conversation_name_its_line(data_file: Write) -> None:
    dropping = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, USER, SECOND]
    with pytest.raises(ValueError, match=r"the data row of sample 0 .*leaves out the tool calls of message 1"):
        rollout(data_file([{"messages": dropping}]), style="thinking")
    with pytest.raises(ValueError, match=r"data.jsonl:2: the chat template fails on it: .*roles must alternate"):
        rollout(data_file([{"messages": TALK}, {"messages": [USER, MORE, FIRST]}]), style="inst")
    with pytest.raises(ValueError, match="it has neither a label nor a message of the assistant with a weight"):
        args = sft_args("none")
        context = RolloutContext(args, None, chat_tokenizer("roles"), RewardPool(args))
        asyncio.run(generate_rollout(args, 0, _Bare(), context))


class _Bare:
    """A data source of samples with nothing to learn."""

    num_prompts = 1

    def get_groups(self, num: int, *, rollout_id: int) -> list[list[Sample]]:
        return [[Sample(group_index=number, index=number, prompt=[USER])] for number in range(num)]

    def add_groups(self, groups: Sequence[list[Sample]]) -> None:
        raise AssertionError("nothing is given back")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


def test_a_plan_marks_what_is_trained(data_file: Write, tmp_path: Path) -> None:
    chat_tokenizer("roles").save_pretrained(tmp_path / "hf")
    path = data_file([{"messages": TALK}, {"messages": TALK[:2]}])
    lines = survey(sft_args(path, hf_checkpoint=str(tmp_path / "hf"), rollout_max_context_len=15))
    assert lines == [
        ("examples", "2 rows in 1 file"),
        ("", "tokens in an example: median 10, p99 16, max 16"),
        ("", "1 of 2 do not fit and are left out: they have more than 15 tokens"),
        ("", "trained: 11 of 26 tokens (42.3%)"),
        ("", "first example, trained text in «»: " + ALL.replace("\n", r"\n")),
    ]
    [*_, broken] = survey(sft_args(path, hf_checkpoint=str(tmp_path)))
    assert broken[1].startswith("examples not tokenized: tokenizer.json cannot be read")
