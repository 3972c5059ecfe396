"""Five styles of chat templates, with tokenizers that know their special tokens and merge a few characters.

The templates are written for these tests. Each has what distinguishes its style:

- chatml: a default system message, tools in the system turn, calls as JSON in tags (like Qwen2.5).
- thinking: ChatML that writes the reasoning of the last turn alone, and an empty block if there is none (like Qwen3).
- headers: roles in headers, two line ends, trimmed content, a call as bare JSON (like Llama 3).
- roles: a token for each role, and none that ends a turn: the next role's token does (like GLM-4).
- inst: `[INST]`, no token for the assistant, tools before the user's last message (like Mistral).
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = """
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}
{%- else %}{% set system = 'You help.' %}{% endif %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}{% endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- elif not (message.role == 'system' and loop.first) %}
{{- '<|im_start|>' + message.role }}
{%- if message.content or not message.tool_calls %}{{ '\\n' + message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) }}
{{- '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
THINKING = """
{%- set last = namespace(query=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.query = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- set answer = message.content.split('</think>')[-1].lstrip('\\n') %}
{%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- if '</think>' not in message.content %}{% set thought = message.reasoning_content or '' %}{% endif %}
{%- if loop.index0 > last.query %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
{{- answer }}
{%- else %}{{ message.content }}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}
"""
HEADERS = """
{{- '<|begin|>' }}
{%- if date is not defined %}{% set date = 'May 1' %}{% endif %}
{%- for message in messages %}
{{- '<|header|>' + message.role + '<|/header|>\\n\\n' }}
{%- if message.role == 'system' %}{{ 'Today: ' + date + '\\n' }}{% endif %}
{%- if message.tool_calls %}
{%- set call = message.tool_calls[0].function %}
{{- {'name': call.name, 'parameters': call.arguments} | tojson }}
{%- else %}{{ message.content | trim }}{% endif %}
{{- '<|eom|>' if message.tool_calls else '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\\n\\n' }}{% endif %}
"""
ROLES = """
{{- '[gMASK]<sop>' }}
{%- if tools %}{{ '<|system|>\\n' + (tools | tojson) }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}{{ '<|observation|>\\n' + message.content }}
{%- elif message.tool_calls %}
{%- for call in message.tool_calls %}
{{- '<|assistant|>' + call.function.name + '\\n' + (call.function.arguments | tojson) }}
{%- endfor %}
{%- else %}{{ '<|' + message.role + '|>\\n' + message.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""
INST = """
{{- '<s>' }}
{%- set first = 1 if messages[0].role == 'system' else 0 %}
{%- set last = namespace(user=0, count=0) %}
{%- for message in messages[first:] %}
{%- if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}
{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
{%- if (message.role == 'user') != (last.count % 2 == 0) %}
{{- raise_exception('roles must alternate user and assistant') }}{% endif %}
{%- set last.count = last.count + 1 %}
{%- endif %}
{%- endfor %}
{%- for message in messages[first:] %}
{%- if message.role == 'user' %}
{%- if tools and loop.index0 == last.user %}{{ '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{% endif %}
{{- '[INST] ' }}
{%- if first and loop.index0 == last.user %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{{- message.content + '[/INST]' }}
{%- elif message.role == 'tool' %}{{ '[RESULT]' + message.content + '[/RESULT]' }}
{%- elif message.tool_calls %}
{{- '[CALLS]' }}{% for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}{{ '</s>' }}
{%- else %}{{ ' ' + message.content + '</s>' }}{% endif %}
{%- endfor %}
"""
_STYLES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "chatml": (CHATML, "<|im_end|>", ("<|im_start|>", "<|endoftext|>")),
    "thinking": (THINKING, "<|im_end|>", ("<|im_start|>", "<|endoftext|>")),
    "headers": (HEADERS, "<|eot|>", ("<|begin|>", "<|header|>", "<|/header|>", "<|eom|>")),
    "roles": (ROLES, "<|endoftext|>",
              ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<|system|>")),
    "inst": (INST, "</s>", ("<s>", "[INST]", "[/INST]", "[TOOLS]", "[/TOOLS]", "[RESULT]", "[/RESULT]", "[CALLS]")),
}  # fmt: skip
STYLES = tuple(_STYLES)
_MERGES = [("Ċ", "Ċ"), ("Ġ", "a"), ("a", "b"), ("ab", "ab"), (">", "Ċ"), ("}", "Ċ")]
"""Line ends, spaces and letters that merge; the last two would merge a tag with the line end after it."""

CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@cache
def chat_tokenizer(style: str) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer with the style's template and special tokens."""
    template, end, others = _STYLES[style]
    return make_tokenizer(template, end, others)


def make_tokenizer(template: str, end: str, others: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer with these special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = [left + right for left, right in _MERGES]
    vocabulary = {token: number for number, token in enumerate([end, *others, *letters, *merged])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=list(_MERGES)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([end, *others])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, pad_token=end, chat_template=template)
