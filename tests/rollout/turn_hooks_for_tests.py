"""Environments that tests name by dotted path."""

from __future__ import annotations

import asyncio

from slime.core.sample import Status
from slime.rollout.multi_turn import MultiTurnEnv


class Echo(MultiTurnEnv):
    """Answers with the number of the turn, and ends after three turns."""

    def reply(self, said: str) -> str | None:
        self.state["said"] = [*self.state.get("said", []), said]
        return None if self.turn == 3 else f"turn {self.turn}"

    def reward(self) -> float | None:
        return float(len(self.state["said"])) + self.sample.index % 2 if "said" in self.state else 0.0


class Slow(Echo):
    """Waits before it answers, as a tool does."""

    async def reply(self, said: str) -> str | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert self.sample.status is Status.ABORTED
        await asyncio.sleep(0.02)
        return super().reply(said)


class Short(Echo):
    max_turns = 2

    def reward(self) -> None:
        """Leave it to the run's reward."""


class Failing(Echo):
    """Fails in its second turn, and counts its calls."""

    def reply(self, said: str) -> str | None:
        CALLS.append(self.turn)
        if self.turn == 2:
            raise KeyError("tool")
        return super().reply(said)


CALLS: list[int] = []
failing = Failing.generate
echo, slow, short = Echo.generate, Slow.generate, Short.generate
