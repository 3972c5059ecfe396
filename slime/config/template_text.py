"""The text of a model's chat template.

- Used by: the rule for the template's variables, and the plan, which renders the first prompts.
- Invariant: it is read as data; nothing is rendered here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from slime.core.small_files import MEBIBYTE, read_json_object, read_small

_MAX_TEMPLATE = MEBIBYTE


def template_text(folder: Path) -> str | None:
    """Return the text of the chat template in an HF directory; None if there is none, or it cannot be read.

    Of several named templates it is the one named `default`.
    """
    try:
        if os.path.exists(folder / "chat_template.jinja"):
            return read_small(folder / "chat_template.jinja", _MAX_TEMPLATE).decode()
        for name in ("chat_template.json", "tokenizer_config.json"):
            found = read_json_object(folder / name).get("chat_template")
            if isinstance(found, list):
                named = json.loads(json.dumps(found))
                found = next((each["template"] for each in named if each.get("name") == "default"), None)
            if isinstance(found, str):
                return found
    except (OSError, ValueError, LookupError, AttributeError):  # another rule refuses the directory
        return None
    return None
