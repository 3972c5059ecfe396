#!/usr/bin/env python3
"""Make the example's conversations: a user names digits, and the assistant answers with the last digit of their sum.

    PYTHONPATH=. python3 examples/sft_chat/make_conversations.py --out outputs/sft-chat/task --seed 1

    {"messages": [{"role": "user", "content": "7"}, {"role": "assistant", "content": "7"},
                  {"role": "user", "content": "5"}, {"role": "assistant", "content": "2"}, ...]}

So an answer needs the assistant's own answer before it. In the training data every fifth answer after the first is
wrong. It has `"weight": 0`: the model reads it, because the conversation goes on from there, but does not learn to say
it. The held-out conversations have no wrong answers.

This writes `model/` (an HF directory with random weights), `train.jsonl` and `held_out.jsonl`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slime.cli.arithmetic.make_task import make_model, make_tokenizer, write_jsonl

CHAT_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""GLM-4's style: the token of the next role ends a turn."""
TURNS = 6
SLIPS = 0.2
"""The share of the training data's answers, after the first of each conversation, that are wrong and have weight 0."""


def conversation(rng: random.Random, slips: float) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    total = 0
    for turn in range(TURNS):
        digit = rng.randrange(10)
        total = (total + digit) % 10
        answer: dict[str, Any] = {"role": "assistant", "content": str(total)}
        if turn and rng.random() < slips:
            total = (total + rng.randrange(1, 10)) % 10
            answer = {"role": "assistant", "content": str(total), "weight": 0}
        messages += [{"role": "user", "content": str(digit)}, answer]
    return messages


def rows(count: int, rng: random.Random, slips: float) -> Iterator[dict[str, Any]]:
    for _ in range(count):
        yield {"messages": conversation(rng, slips)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights and of the conversations")
    parser.add_argument("--num-train", type=int, default=6400)
    parser.add_argument("--num-held-out", type=int, default=64)
    args = parser.parse_args()

    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    write_jsonl(out / "train.jsonl", rows(args.num_train, rng, SLIPS))
    write_jsonl(out / "held_out.jsonl", rows(args.num_held_out, rng, 0))
    make_model(args.seed).save_pretrained(out / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out / "model")
    print(f"{args.num_train} conversations to train on, {args.num_held_out} held out -> {out}")


if __name__ == "__main__":
    main()
