"""Each message is found in a rendered conversation, and each token is the assistant's own or it is not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from chat_styles import CALL, STYLES, TOOLS, chat_tokenizer, make_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from slime.core.sample import Message
from slime.rollout.chat_template import conversation_tokens, render_conversation

SYSTEM = {"role": "system", "content": "s"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOL = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "4"}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


PLAIN = [SYSTEM, user("ab"), answer("abab"), user(" c "), answer("<think>\nx\n</think>\n\nd")]
CALLS = [user("q"), CALLING, TOOL, answer("ab"), user("z"), answer("w")]
CONTINUED = [user("q"), answer("\n\na b")]
CHATML = """<|im_start|>system
s<|im_end|>
<|im_start|>user
ab<|im_end|>
<|im_start|>assistant
«abab<|im_end|>»
<|im_start|>user
 c <|im_end|>
<|im_start|>assistant
«<think>
x
</think>

d<|im_end|>»
"""
PLAIN_MASKS = {
    "chatml": CHATML,
    "thinking": CHATML,  # it changes only earlier answers that have thoughts
    "headers": """<|begin|><|header|>system<|/header|>

Today: May 1
s<|eot|><|header|>user<|/header|>

ab<|eot|><|header|>assistant<|/header|>

«abab<|eot|>»<|header|>user<|/header|>

c<|eot|><|header|>assistant<|/header|>

«<think>
x
</think>

d<|eot|>»""",
    "roles": """[gMASK]<sop><|system|>
s<|user|>
ab<|assistant|>«
abab<|user|>»
 c <|assistant|>«
<think>
x
</think>

d<|endoftext|>»""",
    "inst": """<s>[INST] ab[/INST]« abab</s>»[INST] s

 c [/INST]« <think>
x
</think>

d</s>»""",
}
"""Hand-made: what is between « and » is trained."""
SCHEMA = '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}'
CALLS_MASKS = {
    "chatml": f"""<|im_start|>system
You help.
{SCHEMA}<|im_end|>
<|im_start|>user
q<|im_end|>
<|im_start|>assistant
«<tool_call>
{{"name": "add", "arguments": {{"a": 2}}}}
</tool_call><|im_end|>»
<|im_start|>user
<tool_response>
4
</tool_response><|im_end|>
<|im_start|>assistant
«ab<|im_end|>»
<|im_start|>user
z<|im_end|>
<|im_start|>assistant
«w<|im_end|>»
""",
    "headers": """<|begin|><|header|>user<|/header|>

q<|eot|><|header|>assistant<|/header|>

«{"name": "add", "parameters": {"a": 2}}<|eom|>»<|header|>tool<|/header|>

4<|eot|><|header|>assistant<|/header|>

«ab<|eot|>»<|header|>user<|/header|>

z<|eot|><|header|>assistant<|/header|>

«w<|eot|>»""",
    "roles": f"""[gMASK]<sop><|system|>
[{SCHEMA}]<|user|>
q<|assistant|>«add
{{"a": 2}}<|observation|>»
4<|assistant|>«
ab<|user|>»
z<|assistant|>«
w<|endoftext|>»""",
    "inst": f"""<s>[INST] q[/INST]«[CALLS]{{"name": "add", "arguments": {{"a": 2}}}}</s>»[RESULT]4[/RESULT]« ab</s>»\
[TOOLS][{SCHEMA}][/TOOLS][INST] z[/INST]« w</s>»""",
}
CONTINUED_MASKS = {
    "chatml": "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    "«\n\na b<|im_end|>»\n",
    "thinking": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\na b<|im_end|>»\n",
    "headers": "<|begin|><|header|>user<|/header|>\n\nq<|eot|><|header|>assistant<|/header|>\n\n«a b<|eot|>»",
    "roles": "[gMASK]<sop><|user|>\nq<|assistant|>«\n\n\na b<|endoftext|>»",
    "inst": "<s>[INST] q[/INST]« \n\na b</s>»",
}
CASES = [
    *((style, PLAIN, None, PLAIN_MASKS[style]) for style in STYLES),
    *((style, CALLS, TOOLS, CALLS_MASKS[style]) for style in STYLES if style != "thinking"),
    *((style, CONTINUED, None, CONTINUED_MASKS[style]) for style in STYLES),
]


def by_hand(tokenizer: PreTrainedTokenizerFast, marked: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a text with « and », and 1 for each token between them."""
    ids: list[int] = []
    mask: list[int] = []
    for number, piece in enumerate(marked.replace("»", "«").split("«")):
        found = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += found
        mask += [number % 2] * len(found)
    return ids, mask


def trained(
    tokenizer: PreTrainedTokenizerFast, messages: list[Message], tools: list[dict[str, Any]] | None, **more: Any
) -> tuple[list[int], list[int]]:
    whole = render_conversation(tokenizer, messages, tools, more)
    quick = render_conversation(tokenizer, messages, tools, more, answers_only=True)
    found = conversation_tokens(tokenizer, whole)
    assert conversation_tokens(tokenizer, quick) == found
    return found.ids, [int(number >= 0) for number in found.message_T]


@pytest.mark.parametrize(("style", "messages", "tools", "marked"), CASES)
def test_masks_equal_those_made_by_hand(
    style: str, messages: list[Message], tools: list[dict[str, Any]] | None, marked: str
) -> None:
    tokenizer = chat_tokenizer(style)
    ids, mask = trained(tokenizer, messages, tools)
    assert (ids, mask) == by_hand(tokenizer, marked)
    for wrong in ([*mask[1:], 0], [0, *mask[:-1]], [1 - each for each in mask]):
        assert wrong != by_hand(tokenizer, marked)[1], "control: another mask is noticed"


def test_a_prompt_with_closed_reasoning_is_no_answer() -> None:
    tokenizer = chat_tokenizer("thinking")
    ids, mask = trained(tokenizer, [user("q"), answer("a")], None, enable_thinking=False)
    header = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert (ids, mask) == by_hand(tokenizer, f"{header}<think>\n\n</think>\n\n«a<|im_end|>»\n")
    ids, mask = trained(tokenizer, [user("q"), answer("a")], None)
    assert (ids, mask) == by_hand(tokenizer, f"{header}«<think>\n\n</think>\n\na<|im_end|>»\n"), "control"


def test_tokens_numbered_by_their_message() -> None:
    tokenizer = chat_tokenizer("roles")
    found = conversation_tokens(tokenizer, render_conversation(tokenizer, CALLS, TOOLS))
    texts = {
        number: tokenizer.decode([each for each, of in zip(found.ids, found.message_T, strict=True) if of == number])
        for number in sorted(set(found.message_T))
    }
    del texts[-1]
    assert texts == {1: 'add\n{"a": 2}<|observation|>', 3: "\nab<|user|>", 5: "\nw<|endoftext|>"}


def test_a_token_that_would_cross_is_cut() -> None:
    """The prompt ends with one line end and the answer begins with two; in one text, the first two would merge."""
    tokenizer = chat_tokenizer("chatml")
    ids, mask = trained(tokenizer, [SYSTEM, user("q"), answer("\na")], None)
    text = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«\na<|im_end|>»\n"
    assert (ids, mask) == by_hand(tokenizer, text)
    whole = tokenizer(text.replace("«", "").replace("»", ""), add_special_tokens=False)["input_ids"]
    assert len(ids) == len(whole) + 1, "control: the whole text has the merged token"


def test_templates_that_leave_something_out_are_refused() -> None:
    dropped = make_tokenizer("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "</s>")
    with pytest.raises(ValueError, match="its chat template leaves out message 1, of role 'assistant'"):
        render_conversation(dropped, [user("a"), answer("b")])
    with pytest.raises(ValueError, match="leaves out the tool calls of message 1; remove them from the data"):
        render_conversation(chat_tokenizer("thinking"), [user("a"), CALLING, TOOL, answer("b")])
    with pytest.raises(ValueError, match="leaves out the content next to the tool calls of message 1"):
        render_conversation(chat_tokenizer("headers"), [user("a"), CALLING | {"content": "so"}, TOOL, answer("b")])
    repeated = make_tokenizer("{{ messages[1].content }}|{% for m in messages %}{{ m.content }}{% endfor %}", "</s>")
    with pytest.raises(ValueError, match="it cannot be told where message 1, of role 'assistant', is"):
        render_conversation(repeated, [user("a"), answer("b")])
    endless = make_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "</s>")
    assert render_conversation(endless, [user("a"), answer("b")]).text == "user: a\nassistant: b</s>"
    endless.eos_token = None
    with pytest.raises(ValueError, match="names no eos_token to end a response"):
        render_conversation(endless, [user("a"), answer("b")])


def test_arguments_as_text_are_not_quoted_twice() -> None:
    written = CALL | {"function": {"name": "add", "arguments": '{"a": 2}'}}
    conversation = [user("q"), {"role": "assistant", "content": None, "tool_calls": [written]}, TOOL, answer("ab")]
    tokenizer = chat_tokenizer("chatml")
    assert render_conversation(tokenizer, conversation, TOOLS) == render_conversation(tokenizer, CALLS[:4], TOOLS)


words = st.text(alphabet='ab \n.<é漢{"', max_size=8).map(lambda text: f"{text}x")


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Draw conversations of one to four rounds, with system messages, calls, and reasoning."""
    messages: list[Message] = [SYSTEM | {"content": draw(words)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append(user(draw(words)))
        if draw(st.booleans()):
            messages += [CALLING, TOOL | {"content": draw(words)}]
        reasoning = draw(st.sampled_from(("", "<think>\nab\n</think>\n\n")))
        messages.append(answer(reasoning + draw(words)))
    return messages


@settings(max_examples=25)
@given(messages=conversations())
@example(messages=[user("x"), answer("\n\nx")])  # cut, it has as many tokens as before
@pytest.mark.parametrize("style", STYLES)
def test_spans_tile_the_text(style: str, messages: list[Message]) -> None:
    if style == "thinking":
        messages = [message for message in messages if message is not CALLING and message["role"] != "tool"]
    tokenizer = chat_tokenizer(style)
    conversation = render_conversation(tokenizer, messages, TOOLS)
    assert conversation.spans[0].start == 0 and conversation.spans[-1].end == len(conversation.text)
    for before, after in itertools.pairwise(conversation.spans):
        assert before.start <= before.words <= before.words_end <= before.end == after.start
    found = conversation_tokens(tokenizer, conversation)
    assert tokenizer.decode(found.ids) == conversation.text
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    for number in answers:
        of_message = [each for each, of in zip(found.ids, found.message_T, strict=True) if of == number]
        assert tokenizer.decode(of_message) == conversation.words(number)
        assert conversation.spans[number].closed
        said = messages[number]["content"].split("</think>")[-1].strip()
        assert said in conversation.words(number)
    assert [number for number, _ in itertools.groupby(found.message_T) if number >= 0] == answers, "each once, in order"
    assert conversation_tokens(tokenizer, render_conversation(tokenizer, messages, TOOLS, answers_only=True)) == found
    whole = tokenizer(conversation.text, add_special_tokens=False, return_offsets_mapping=True)
    edges = [edge for n in answers for edge in (conversation.spans[n].words, conversation.spans[n].words_end)]
    crossed = any(low < edge < high for low, high in whole["offset_mapping"] for edge in edges)
    assert (found.ids == whole["input_ids"]) != crossed, "other tokens where one would cross an edge, and only there"
