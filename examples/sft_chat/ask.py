#!/usr/bin/env python3
"""Ask a model for every answer of the held-out conversations, greedily, and print how many are right.

    PYTHONPATH=. python3 examples/sft_chat/ask.py --model outputs/sft-chat/sft/hf --data .../held_out.jsonl

transformers generates the answers; it shares no code with slime's training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from slime.cli.answers import greedy_answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="HF_DIR")
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    talks = [json.loads(line)["messages"] for line in args.data.read_text().splitlines()]
    turns = range(1, len(talks[0]), 2)
    right = 0
    for turn in turns:
        answers = greedy_answers(args.model, [talk[:turn] for talk in talks], 2)
        right += sum(answer == talk[turn]["content"] for answer, talk in zip(answers, talks, strict=True))
    print(f"right: {right} of {len(talks) * len(turns)} answers")


if __name__ == "__main__":
    main()
