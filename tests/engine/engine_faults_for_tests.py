"""Faults that a test plants in the process of an engine before it serves."""

from __future__ import annotations

from typing import Any

from slime.engine.embedded.model import Model


def fail_in_the_third_step() -> None:
    decode, steps = Model.decode, list[None]()

    def broken(self: Model, *rest: Any) -> Any:
        steps.append(None)
        if len(steps) == 3:
            raise RuntimeError("planted fault")
        return decode(self, *rest)

    Model.decode = broken
