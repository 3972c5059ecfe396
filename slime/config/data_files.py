"""Prompt files: `path@[a:b]` slices, and a check of every line before anything starts.

Path: `rules` calls `check_jsonl` in real runs; the data buffer reads the same files with `split_slice`. Invariant: a
line that passes here can be made into a Sample.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import orjson

from slime.config.problem import Problem

MAX_REPORTED = 5


def split_slice(path: str) -> tuple[str, slice]:
    """`"data.jsonl@[10:20]"` -> `("data.jsonl", slice(10, 20))`; without one, all lines. Bounds as Python's.

    Raises:
        ValueError: what stands behind @ is not a slice.
    """
    match = re.fullmatch(r"(.*)@(\[.*)", path)
    if match is None:
        return path, slice(None)
    bounds = re.fullmatch(r"\[(-?\d*):(-?\d*)\]", match[2])
    if bounds is None or "-" in bounds.groups():
        raise ValueError(f"{path}: {match[2]} is not a slice; write path@[start:stop], either of them may be left out")
    start, stop = (int(text) if text else None for text in bounds.groups())
    return match[1], slice(start, stop)


def _line_fault(line: bytes, input_key: str, label_key: str | None, chat_template: bool) -> tuple[str, str] | None:
    """Rule and remedy for one line that cannot be used; None where it can."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return f"not JSON ({error})", "write one JSON object a line"
    if not isinstance(row, dict):
        return "not a JSON object", "write one JSON object a line"
    row = cast(dict[str, Any], row)
    for key, flag in ((input_key, "input-key"), (label_key, "label-key")):
        if key is not None and key not in row:
            return f"no key {key!r}; it has {', '.join(row) or 'none'}", f"correct the line, or --{flag}"
    label = None if label_key is None else row[label_key]
    if label_key is not None and (isinstance(label, bool) or not isinstance(label, str | int | float)):
        return f"{label_key!r} is {label!r}, not text or a number", "correct the line, or --label-key"
    prompt = row[input_key]
    if not chat_template:
        is_text = isinstance(prompt, str)
        return None if is_text else (f"{input_key!r} is not text", "for OpenAI messages, add --apply-chat-template")
    messages = cast(list[Any], prompt) if isinstance(prompt, list) else []
    if not messages or not all(isinstance(message, dict) and "role" in message for message in messages):
        rule = f"{input_key!r} is not a list of OpenAI messages ({{'role': ..., 'content': ...}})"
        return rule, "correct the line, or leave out --apply-chat-template for plain text"
    return None


def check_jsonl(path: str, input_key: str, label_key: str | None = None, *, chat_template: bool) -> list[Problem]:
    """Errors with file and line number, the first five and a count; `path` may carry a slice.

    Raises:
        OSError: the file cannot be read.
        ValueError: the slice cannot be read.
    """
    file, chosen = split_slice(path)
    with Path(file).open("rb") as stream:
        lines = [(number, line) for number, line in enumerate(stream, start=1) if line.strip()][chosen]
    faults = [(number, _line_fault(line, input_key, label_key, chat_template)) for number, line in lines]
    bad = [(number, fault) for number, fault in faults if fault is not None]
    problems = [
        Problem(severity="error", where=f"{file}:{number}", rule=rule, remedy=remedy)
        for number, (rule, remedy) in bad[:MAX_REPORTED]
    ]
    if len(bad) > MAX_REPORTED:
        more = f"{len(bad) - MAX_REPORTED} more lines of {len(lines)} cannot be used"
        problems.append(Problem(severity="error", where=file, rule=more, remedy="correct them too"))
    if not lines:
        problems.append(Problem(severity="error", where=path, rule="holds no prompts", remedy="give it some lines"))
    return problems
