"""The plan's tokenizer gives the texts and tokens of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from slime.rollout.plan_tokenizer import PlanTokenizer

TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content }}{% endgeneration %}
    {%- else %}
        {{- '<|user|>' + message.content | trim }}
    {%- endif %}
    {%- if loop.index0 > 5 %}{%- break %}{%- endif %}
{%- endfor %}
    {% if messages %}
!{% endif %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{%- endif %}
{%- if add_generation_prompt %}<|assistant|>{%- endif %}
"""
USER = {"role": "user", "content": " What is 17 * 3? "}


@pytest.fixture
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A directory whose template has all that transformers adds to jinja."""
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<sop>", chat_template=TEMPLATE
    )
    whole.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("messages", "more"),
    [
        ([USER], {}),
        ([USER] * 9, {}),
        ([USER, {"role": "assistant", "content": "So <user> "}], {"continue_final_message": True}),
        ([USER], {"tools": [{"name": "f", "about": "<b> caf\u00e9"}], "enable_thinking": False}),
    ],
)
def test_texts_and_tokens_are_those_of_transformers(
    folder: Path, messages: list[dict[str, Any]], more: dict[str, Any]
) -> None:
    ours, theirs = PlanTokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    continues = "continue_final_message" in more
    given: dict[str, Any] = {"tools": None, "continue_final_message": False, "add_generation_prompt": not continues}
    text = ours.apply_chat_template(messages, tokenize=False, **(given | more))
    assert text == theirs.apply_chat_template(messages, tokenize=False, **(given | more))
    ids = ours([text, USER["content"]], add_special_tokens=False, verbose=False)["input_ids"]
    assert ids == theirs([text, USER["content"]], add_special_tokens=False)["input_ids"]


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        PlanTokenizer(str(tmp_path))
