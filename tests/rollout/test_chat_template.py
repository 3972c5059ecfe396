"""A conversation is rendered up to where the assistant continues, and no text gets a special token twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.config.data_rows import DataKeys
from slime.core.sample import Sample
from slime.rollout.chat_template import render_messages
from slime.rollout.context import RolloutContext
from slime.rollout.prompts import PromptSet, load_prompts
from slime.rollout.reward_pool.pool import RewardPool
from slime.rollout.sft_rollout import fill_responses
from slime.rollout.tokenizer import tokenize_texts

KEYS = DataKeys(input_key="prompt", label_key=None, metadata_key="metadata", tool_key=None)
WITH_ENDS = (
    "<s>{% for m in messages %}{% if m.role in roles %}[{{ m.role }}]{{ m.content | trim }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
).replace("roles", "['system', 'user', 'assistant', 'tool']")
USER, SYSTEM = {"role": "user", "content": "a"}, {"role": "system", "content": "s"}
SPECIAL = ["<s>", "</s>", "[x]"]


def _tokenizer(around: str | None, template: str | None = WITH_ENDS) -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token a character. `around` is what its post-processor writes, as `<s> $A </s>`."""
    characters = [chr(number) for number in range(32, 127)]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *characters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(SPECIAL)
    if around is not None:
        specials: list[tuple[str, int]] = [(token, vocabulary[token]) for token in SPECIAL]
        inner.post_processor = processors.TemplateProcessing(single=around, special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=template, pad_token="[x]"
    )


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([USER], "<s>[user]a</s>[assistant]<think>"),
        ([USER, {"role": "assistant", "content": "So"}], "<s>[user]a</s>[assistant]So"),
        ([USER, {"role": "assistant", "content": "s>"}], "<s>[user]a</s>[assistant]s>"),  # a part of the end token
        ([USER, {"role": "assistant", "content": "a"}], "<s>[user]a</s>[assistant]a"),
        ([USER, {"role": "assistant", "content": ""}], "<s>[user]a</s>[assistant]"),
        ([USER, {"role": "assistant", "content": [{"type": "text", "text": "S"}, {"type": "text", "text": "o"}]}],
         "<s>[user]a</s>[assistant]So"),
        ([USER, {"role": "assistant", "content": "So"}, USER],
         "<s>[user]a</s>[assistant]So</s>[user]a</s>[assistant]<think>"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [{}]}, {"role": "tool", "content": "1"}],
         "<s>[user]a</s>[assistant]</s>[tool]1</s>[assistant]<think>"),
    ],
)  # fmt: skip
def test_the_assistants_last_message_is_continued(messages: list[dict[str, Any]], text: str) -> None:
    assert render_messages(_tokenizer(None), messages, None) == text


def test_a_template_that_drops_the_prefill_is_named() -> None:
    users_alone = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"its chat template cannot be rendered .*final message does not appear"):
        render_messages(_tokenizer(None, users_alone), [USER, {"role": "assistant", "content": "So"}], None)


def test_a_role_unknown_to_the_template_is_named() -> None:
    critic = {"role": "critic", "content": "no"}
    with pytest.raises(ValueError, match="its chat template leaves out message 1, whose role is 'critic'"):
        render_messages(_tokenizer(None), [USER, critic], None)
    any_role = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert render_messages(_tokenizer(None, any_role), [USER, critic], None) == "[user]a[critic]no"


def _load(
    data_file: Callable[..., str], tokenizer: PreTrainedTokenizerFast, prompts: list[Any], *, chat: bool
) -> PromptSet:
    path = data_file([{"prompt": prompt} for prompt in prompts])
    return load_prompts(path, Args(apply_chat_template=chat), tokenizer, KEYS, longest=None)


@pytest.mark.parametrize(
    ("around", "texts", "expected"),
    [
        (None, ["ab"], ["ab"]),
        ("<s> $A", ["ab", "<s>ab", "a<s>"], ["<s>ab", "<s>ab", "<s>a<s>"]),
        ("<s> $A </s>", ["ab", "<s>ab", "<s>"], ["<s>ab", "<s>ab", "<s>"]),
        ("$A </s>", ["ab", "ab</s>"], ["ab", "ab</s>"]),
        ("[x] <s> $A", ["ab", "<s>ab", "[x]<s>ab"], ["[x]<s>ab", "[x]<s>ab", "[x]<s>ab"]),
    ],
)
def test_a_text_gets_each_special_token_once(
    data_file: Callable[..., str], around: str | None, texts: list[str], expected: list[str]
) -> None:
    tokenizer = _tokenizer(around)
    prompts = _load(data_file, tokenizer, texts, chat=False).prompts
    assert [tokenizer.decode(prompt.tokens) for prompt in prompts] == expected


def test_a_text_without_tokens_changes_no_other_text() -> None:
    tokenizer = _tokenizer("<s> $A </s>")
    assert tokenize_texts(tokenizer, []) == []
    assert [tokenizer.decode(ids) for ids in tokenize_texts(tokenizer, ["", "ab"])] == ["<s>", "<s>ab"]


def test_a_conversation_gets_only_the_templates_special_tokens(data_file: Callable[..., str]) -> None:
    tokenizer = _tokenizer("<s> $A </s>")
    [first, second] = _load(
        data_file, tokenizer, [[USER], [USER, {"role": "assistant", "content": "So"}]], chat=True
    ).prompts
    assert tokenizer.decode(first.tokens) == "<s>[user]a</s>[assistant]<think>"
    assert tokenizer.decode(second.tokens) == "<s>[user]a</s>[assistant]So"
    assert second.prompt == [USER, {"role": "assistant", "content": "So"}]


def test_a_row_that_a_template_refuses_is_named(data_file: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match=r"data.jsonl:2: the chat template fails on it: .*leaves out message 1"):
        _load(data_file, _tokenizer(None), [[USER], [USER, {"role": "critic", "content": "no"}]], chat=True)


def test_supervised_rows_may_continue_a_turn() -> None:
    tokenizer = _tokenizer("<s> $A </s>")
    args = Args(loss_type="sft_loss", label_key="label", custom_rm_path="rewards_for_tests.coin")
    sample = Sample(label="it is b")
    text = render_messages(tokenizer, [USER, {"role": "assistant", "content": "So"}], None)
    sample.tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    sample.prompt_length = len(sample.tokens)
    fill_responses(args, [sample], RolloutContext(args, None, tokenizer, RewardPool(args)))
    assert tokenizer.decode(sample.tokens) == "<s>[user]a</s>[assistant]Soit is b</s>"
    assert sample.loss_mask == [1] * (len("it is b") + 1)
