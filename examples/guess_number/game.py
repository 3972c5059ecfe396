"""A game as an environment: guess a number from 1 to 15 within four guesses; each wrong one is answered with a hint.

--custom-generate-function-path examples/guess_number/game.py:generate
"""

from __future__ import annotations

from slime import MultiTurnEnv


class GuessNumber(MultiTurnEnv):
    """The label is the number. A game is won (reward 1) or lost (reward 0)."""

    max_turns = 4

    def reply(self, said: str) -> str | None:
        number = int(self.sample.label or 0)
        self.state["won"] = said == str(number)
        if self.state["won"]:
            return None
        return "higher" if said.isdecimal() and int(said) < number else "lower"

    def reward(self) -> float:
        return float(self.state.get("won", False))


generate = GuessNumber.generate
