#!/usr/bin/env python3
"""Make the tool example's task: problems like 47*8+35, and demonstrations by a careless pupil with a calculator.

    PYTHONPATH=. python3 examples/tool_use/make_task.py --out outputs/tool-use/task --seed 1

It writes the same files as examples/arithmetic/make_task.py (with the same tiny GLM-4 and its tokenizer), for other
problems. The demonstrations show the whole conversation with the calculator, including its outputs:

    calc(47*8)=376;calc(376+35)=411;</think>\\boxed{411}

The pupil guesses more often than it uses the calculator, and mistypes every fourth number; such a slip is carried on to
the end. So reinforcement learning has something to find: use the calculator, and copy with care.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.tool_use.calculator import calculate
from slime.cli.arithmetic.make_task import EVAL_CONFIG, make_model, make_tokenizer, write_jsonl

SPLIT_SEED = 20240614
"""All runs have the same split: the seed of a run changes weights, demonstrations, data order and sampling."""
GUESSES = 0.6
"""The share of demonstrations that do not use the calculator and are up to 9 off."""
SLIPS = 0.25
"""The share of calls in which one digit of a number is wrong."""

Problem = tuple[int, int, int]


def split_problems(num_train: int, num_eval: int) -> tuple[list[Problem], list[Problem]]:
    """Return different problems a * b + c as (train, eval)."""
    everything = [(a, b, c) for a in range(10, 100) for b in range(2, 10) for c in range(10, 100)]
    drawn = random.Random(SPLIT_SEED).sample(everything, num_train + num_eval)
    return drawn[:num_train], drawn[num_train:]


def ask_like_a_careless_pupil(problem: Problem, rng: random.Random) -> str:
    """Return the response to `a*b+c=?` after the prompt's `<think>`, including the calculator's outputs."""
    a, b, c = problem
    if rng.random() < GUESSES:
        return f"</think>\\boxed{{{max(0, a * b + c + rng.randint(-9, 9))}}}"
    product = f"{_typed(a, rng)}*{b}"
    total = f"{_typed(calculate(product) or 0, rng)}+{c}"
    turns = "".join(f"calc({expression})={calculate(expression)};" for expression in (product, total))
    return f"{turns}</think>\\boxed{{{calculate(total)}}}"


def _typed(number: int, rng: random.Random) -> str:
    """Return the number, sometimes with one wrong digit."""
    digits = list(str(number))
    if rng.random() < SLIPS:
        place = rng.randrange(len(digits))
        digits[place] = rng.choice([digit for digit in "123456789" if digit != digits[place]])
    return "".join(digits)


def line(problem: Problem) -> dict[str, Any]:
    a, b, c = problem
    return {"prompt": [{"role": "user", "content": f"{a}*{b}+{c}=?"}], "label": str(a * b + c)}


def demonstrations(train: list[Problem], count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    for problem in rng.choices(train, k=count):
        yield {**line(problem), "response": ask_like_a_careless_pupil(problem, rng)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights and of the demonstrations")
    parser.add_argument("--num-train", type=int, default=8192, help="problems to train on")
    parser.add_argument("--num-eval", type=int, default=128, help="problems held out")
    parser.add_argument("--num-demonstrations", type=int, default=9600)
    args = parser.parse_args()

    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = split_problems(args.num_train, args.num_eval)
    write_jsonl(out / "train.jsonl", map(line, train))
    write_jsonl(out / "eval.jsonl", map(line, held_out))
    rng = random.Random(args.seed)
    write_jsonl(out / "demonstrations.jsonl", demonstrations(train, args.num_demonstrations, rng))
    (out / "eval.yaml").write_text(EVAL_CONFIG.format(path=(out / "eval.jsonl").resolve()))
    make_model(args.seed).save_pretrained(out / "model")
    make_tokenizer().save_pretrained(out / "model")
    counts = f"{len(train)} problems to train on, {len(held_out)} held out, {args.num_demonstrations} demonstrations"
    print(f"{counts} -> {out}")


if __name__ == "__main__":
    main()
