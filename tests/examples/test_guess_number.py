"""The guessing game: its length and its hints."""

from __future__ import annotations

import ast
import random
from pathlib import Path

from examples.guess_number import game
from examples.guess_number.game import GuessNumber
from examples.guess_number.make_task import NUMBERS, careless_game
from slime.core.sample import Sample
from slime.rollout.context import RolloutContext


def played(number: int, guesses: list[str]) -> tuple[list[str | None], float]:
    env = GuessNumber(Sample(label=str(number)), RolloutContext(None, None, None, None))  # pyright: ignore[reportArgumentType]
    return [env.reply(guess) for guess in guesses], env.reward()


def test_the_game_gives_hints() -> None:
    assert played(9, ["8", "12", "nine", "9"]) == (["higher", "lower", "lower", None], 1.0)
    assert played(9, ["8", "12"]) == (["higher", "lower"], 0.0)
    assert played(9, []) == ([], 0.0)


def test_the_environment_has_twenty_lines() -> None:
    tree = ast.parse(Path(game.__file__).read_text())
    [made] = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert made.end_lineno is not None and made.end_lineno - made.lineno + 1 <= 20


def test_the_careless_player_can_be_beaten() -> None:
    rng = random.Random(0)
    games = [careless_game(number, rng) for number in NUMBERS for _ in range(200)]
    numbers = [number for number in NUMBERS for _ in range(200)]
    won = [game[-1]["content"] == str(number) for game, number in zip(games, numbers, strict=True)]
    assert 0.3 < sum(won) / len(won) < 0.8
    for number in NUMBERS:
        low, high, guesses = 1, 15, list[str]()
        while not guesses or guesses[-1] != str(number):
            middle = (low + high) // 2
            guesses.append(str(middle))
            low, high = (middle + 1, high) if middle < number else (low, middle - 1)
        assert len(guesses) <= 4
