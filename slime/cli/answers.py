"""Show the greedy answers of two HF directories to the same problems side by side.

    slime answers --before outputs/demo-seed1/sft/hf --after outputs/demo-seed1/trained_hf \\
        --prompt-data outputs/demo-seed1/task/eval.jsonl

The answers are generated with transformers, which shares no code with slime's engines, so they are an independent check
of what a run reports.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table


def greedy_answers(model_dir: str, conversations: list[Any], max_new_tokens: int) -> list[str]:
    """Return the model's greedy response to each conversation, without special tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Nothing in the directory is executed: no model code, no pickled weights.
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left", trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    answers: list[str] = []
    for start in range(0, len(conversations), 64):
        inputs = tokenizer.apply_chat_template(
            conversations[start : start + 64],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        outputs = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        answers += tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def is_right(answer: str, label: str) -> bool:
    """Return whether the last box after `</think>` holds exactly the label."""
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", answer.rpartition("</think>")[2]) if "</think>" in answer else []
    return bool(boxes) and boxes[-1].strip() == label


def main(argv: Sequence[str]) -> None:
    """Answer the problems with both models, and print some answers and the number of right ones.

    Raises:
        OSError, ValueError: a directory or the data cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="slime answers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", required=True, metavar="HF_DIR")
    parser.add_argument("--after", required=True, metavar="HF_DIR")
    parser.add_argument("--prompt-data", type=Path, required=True, help="jsonl with `prompt` (messages) and `label`")
    parser.add_argument("--num-shown", type=int, default=8, help="problems printed; all are answered and counted")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    args = parser.parse_args(argv)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    problems = [json.loads(line) for line in args.prompt_data.read_text().splitlines()]
    conversations = [problem["prompt"] for problem in problems]
    labels = [problem["label"] for problem in problems]
    sides = [greedy_answers(path, conversations, args.max_new_tokens) for path in (args.before, args.after)]

    columns = [Column(name, overflow="fold") for name in ("before", "after")]
    table = Table("problem", "label", *columns, title="Greedy answers (transformers' generate)")
    for row in range(min(args.num_shown, len(problems))):
        cells = [f"[{'green' if is_right(side[row], labels[row]) else 'red'}]{escape(side[row])}[/]" for side in sides]
        table.add_row(escape(conversations[row][-1]["content"]), labels[row], *cells)
    console = Console(highlight=False)
    console.print(table)
    before, after = (sum(map(is_right, side, labels)) for side in sides)
    console.print(f"right of all {len(labels)}, greedy: {before} before, {after} after")
