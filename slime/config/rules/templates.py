"""Rules for the variables that --apply-chat-template-kwargs gives to the chat template.

- Used by: `rules.check`.
- Invariant: the template is read as text; it is not rendered here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from slime.config.eval_data import readable_eval_datasets
from slime.config.problem import Problem
from slime.config.rules.case import Case
from slime.config.template_text import template_text

_TAKEN = {
    "add_generation_prompt": "slime sets it: the assistant answers, or continues its last message",
    "continue_final_message": "slime sets it: the assistant answers, or continues its last message",
    "messages": "they come from the data row",
    "conversation": "it comes from the data row",
    "tools": "they come from the data row: use --tool-key",
    "chat_template": "the template comes from --hf-checkpoint",
}
_OF_TOKENIZER = ("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
                 "return_assistant_tokens_mask", "tokenizer_kwargs")  # fmt: skip


def template_variables(case: Case) -> Iterable[Problem]:
    """Refuse variables that slime sets itself, and warn about those that the chat template never reads."""
    args = case.args
    given = [("apply_chat_template_kwargs", "", args.apply_chat_template_kwargs)]
    given += [
        ("eval_config", f"{dataset.name}: apply_chat_template_kwargs: ", dataset.apply_chat_template_kwargs)
        for dataset in readable_eval_datasets(args)
        if dataset.apply_chat_template_kwargs != args.apply_chat_template_kwargs
    ]
    template = template_text(Path(args.hf_checkpoint or ""))
    for field, where, text in given:
        for name in json.loads(text or "{}"):
            if name in _TAKEN:
                yield case.error(field, f"{where}{name} cannot be given ({_TAKEN[name]})", "leave it out")
            elif name in _OF_TOKENIZER:
                rule = f"{where}{name} is an argument of the tokenizer, not a variable of the template"
                yield case.error(field, rule, "leave it out")
            elif template is not None and re.search(rf"\b{re.escape(name)}\b", template) is None:
                rule = f"{where}no effect: the model's chat template does not read {name}"
                yield case.warning(field, rule, "correct or leave it out", also=["hf_checkpoint"])
