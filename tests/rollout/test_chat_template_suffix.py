"""New messages continue tokens that exist, with the end of the turn once; a report says what a template changes."""

from __future__ import annotations

from typing import Any

import pytest
from chat_styles import CALL, HEADERS, STYLES, TOOLS, chat_tokenizer, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from slime.core.sample import Message
from slime.rollout.chat_template import render_messages, render_suffix, template_report

SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "q"}
MORE = {"role": "user", "content": "b"}
ANSWER = {"role": "assistant", "content": "zz"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOL = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "4"}


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("style", "with_calls"), [(style, calls) for style in STYLES for calls in (False, style != "thinking")]
)
def test_the_end_of_a_turn_is_there_once(style: str, with_calls: bool) -> None:
    tokenizer = chat_tokenizer(style)
    messages = [USER, CALLING] if with_calls else [USER, ANSWER]
    new = [TOOL, TOOL] if with_calls else [MORE]
    tools = TOOLS if with_calls else None
    suffix = render_suffix(tokenizer, messages, new, tools)
    end = encode(tokenizer, suffix.end)
    assert len(end) == 1, "a special token"
    ended = encode(tokenizer, "zz" + suffix.end)
    cut_off = encode(tokenizer, "zz")
    whole = cut_off + suffix.tokens(tokenizer, cut_off)
    assert whole == ended + suffix.tokens(tokenizer, ended)
    assert tokenizer.decode(whole) == f"zz{suffix.end}{suffix.text}"
    second = [*cut_off, encode(tokenizer, "<|endoftext|>")[0]] if style == "chatml" else None
    if second is not None:
        assert suffix.tokens(tokenizer, second)[0] == end[0], "another end stays, and the template's follows"
    full = render_messages(tokenizer, [*messages, *new], tools)
    assert full.endswith(suffix.end + suffix.text)
    if style == "chatml":
        assert suffix.text.startswith("\n<|im_start|>user\n") and suffix.text.endswith("<|im_start|>assistant\n")


texts = st.text(alphabet="ab \n<é漢", max_size=6).map(lambda text: f"x{text}x")


@settings(max_examples=20)
@given(answers=st.lists(texts, min_size=1, max_size=3), asked=texts)
@pytest.mark.parametrize("style", STYLES)
def test_turns_in_parts_equal_the_whole(style: str, answers: list[str], asked: str) -> None:
    """A conversation that grows by sampled tokens and suffixes has the text of one that is rendered at the end."""
    tokenizer = chat_tokenizer(style)
    messages: list[Message] = [USER | {"content": asked}]
    tokens = encode(tokenizer, render_messages(tokenizer, messages, None))
    for number, said in enumerate(answers):
        sampled = encode(tokenizer, f" {said}" if style == "inst" else f"\n{said}" if style == "roles" else said)
        messages.append({"role": "assistant", "content": said})
        suffix = render_suffix(tokenizer, messages, [MORE])
        sampled += encode(tokenizer, suffix.end) if number % 2 else []
        tokens += sampled + suffix.tokens(tokenizer, sampled)
        messages.append(MORE)
    assert tokenizer.decode(tokens) == render_messages(tokenizer, messages, None)


def test_what_was_sampled_does_not_change_the_suffix() -> None:
    tokenizer = chat_tokenizer("thinking")
    odd = "<think>\n</think><|im_end|><|im_start|>user\n"
    expected = render_suffix(tokenizer, [USER, ANSWER], [MORE])
    assert render_suffix(tokenizer, [USER, {"role": "assistant", "content": odd}], [MORE]) == expected
    thinking_off = render_suffix(tokenizer, [USER, ANSWER], [MORE], None, {"enable_thinking": False})
    assert thinking_off.text == expected.text + "<think>\n\n</think>\n\n"
    bare = render_suffix(tokenizer, [USER, ANSWER], [MORE], generation_prompt=False)
    assert expected.text == bare.text + "<|im_start|>assistant\n"


def test_a_suffix_requires_an_answer_before_it() -> None:
    tokenizer = chat_tokenizer("chatml")
    with pytest.raises(ValueError, match="must be the assistant's; its role is 'user'"):
        render_suffix(tokenizer, [USER], [MORE])
    with pytest.raises(ValueError, match="no new messages to append"):
        render_suffix(tokenizer, [USER, ANSWER], [])
    with pytest.raises(ValueError, match=r"its chat template cannot be rendered .*roles must alternate"):
        render_suffix(chat_tokenizer("inst"), [USER, ANSWER], [MORE, MORE])


def report(style: str, **variables: Any) -> list[str]:
    """Return the beginning of each offence."""
    return [offence.split(":")[0] for offence in template_report(chat_tokenizer(style), variables).offences]


def test_offences_of_each_style_are_named() -> None:
    assert report("chatml") == report("roles") == []
    assert report("thinking") == [
        "writes its last turn in another way than earlier ones",
        "strips the reasoning of earlier turns (<think>...</think> and the field reasoning_content)",
    ]
    assert report("headers") == ["trims the white space around an answer, which may have been sampled with it"]
    assert report("inst") == [
        "moves the system message as the conversation grows",
        "writes tools or their calls in another place or way as the conversation grows",
    ]
    assert template_report(chat_tokenizer("chatml")).append_only
    assert not template_report(chat_tokenizer("inst")).append_only
    [limit] = template_report(chat_tokenizer("inst")).limits
    assert limit.startswith("cannot render two messages of a user in a row: ")


LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize(
    ("template", "offence"),
    [
        (LOOP + PROMPT, None),
        (LOOP + PROMPT.replace("<assistant>", "<assistant><think>"), "an answer does not begin with the generation"),
        (LOOP.replace("%}<", "if m.role != 'system' %}<", 1) + PROMPT, "leaves the system message out"),
        ("{{ strftime_now('%d %b') }}" + LOOP + PROMPT, "writes today's date into the text"),
        ("{{ messages | length }}" + LOOP + PROMPT, "writes its last turn in another way than earlier ones: '1<user"),
        (HEADERS.replace("| trim", ""), None),
    ],
)  # fmt: skip
def test_an_offence_is_named(template: str, offence: str | None) -> None:
    found = template_report(make_tokenizer(template, "</s>")).offences
    if offence is None:
        assert found == ()
    else:
        assert found[0].startswith(offence)


def test_merged_tokens_are_an_offence() -> None:
    """The line end after a turn merges with the one that begins the next turn."""
    lines = r"{% for m in messages %}{{ '\n' + m.role + ': ' + m.content + '\n' }}{% endfor %}"
    merging = template_report(make_tokenizer(lines, "</s>"))
    assert "its last tokens merge with those of the next turn" in merging.offences[0]
    assert merging.limits == ("has no token that ends an assistant's turn",)
    assert template_report(make_tokenizer(lines.replace(r"+ '\n' }", r"+ '</s>\n' }"), "</s>")).offences, "still merged"
    ended = lines.replace(r"+ '\n' }", r"+ '</s>' }")
    assert template_report(make_tokenizer(ended, "</s>")).offences == (), "control"


def test_no_template_renders_nothing() -> None:
    with pytest.raises(ValueError, match="its chat template cannot be rendered"):
        template_report(make_tokenizer("{{ raise_exception('no') }}", "</s>"))
