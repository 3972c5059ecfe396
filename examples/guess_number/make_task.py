#!/usr/bin/env python3
"""Make the task of the guessing game: a tiny model, the 15 numbers, and the games of a careless player.

    PYTHONPATH=. python3 examples/guess_number/make_task.py --out outputs/guess-number/task --seed 1

The player guesses any number that the hints leave, and forgets them in one of four guesses. It wins about half of its
games. Who always halves what is left wins every game, so reinforcement learning has something to find.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from slime.cli.arithmetic.make_task import EVAL_CONFIG, make_model, make_tokenizer, write_jsonl

NUMBERS = range(1, 16)
FORGETS = 0.25
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROMPT = [{"role": "user", "content": "1-15"}]


def careless_game(number: int, rng: random.Random) -> list[dict[str, str]]:
    """Return the messages of a game of up to four guesses, after the prompt."""
    low, high = NUMBERS[0], NUMBERS[-1]
    messages: list[dict[str, str]] = []
    for turn in range(4):
        guess = rng.choice(NUMBERS) if rng.random() < FORGETS else rng.randint(low, high)
        messages.append({"role": "assistant", "content": str(guess)})
        if guess == number or turn == 3:
            break
        low, high = (max(low, guess + 1), high) if guess < number else (low, min(high, guess - 1))
        messages.append({"role": "user", "content": "higher" if guess < number else "lower"})
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights and of the demonstrations")
    parser.add_argument("--num-demonstrations", type=int, default=6400)
    args = parser.parse_args()

    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    rows: list[dict[str, Any]] = [{"prompt": PROMPT, "label": str(number)} for number in NUMBERS]
    games = [
        {"prompt": PROMPT, "completion": careless_game(rng.choice(NUMBERS), rng)}
        for _ in range(args.num_demonstrations)
    ]
    write_jsonl(out / "train.jsonl", rows * 16)
    write_jsonl(out / "eval.jsonl", rows * 4)
    write_jsonl(out / "demonstrations.jsonl", games)
    (out / "eval.yaml").write_text(EVAL_CONFIG.format(path=(out / "eval.jsonl").resolve()))
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token = TEMPLATE, "<|endoftext|>", "<|observation|>"
    make_model(args.seed).save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    print(f"{len(rows)} numbers to guess, {len(games)} games of a careless player -> {out}")


if __name__ == "__main__":
    main()
