"""Verdict: what became of one reward.

Path: made in a reward worker, or by the pool where that fails it, written into the Sample by `collect`.
Invariant: either a finite reward or the reason why there is none, never a silent 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from slime.core.sample import Sample, Status

TIMEOUT = "timeout"
CRASH = "crash"
MEMORY = "memory"
NOT_A_NUMBER = "not a number"
ERROR = "error"


@dataclass(frozen=True)
class Verdict:
    """`failure` is 'timeout', 'crash', 'memory', 'not a number' or 'error: ...'; None where there is a reward."""

    reward: float | dict[str, float] | None
    failure: str | None = None

    def masked(self, mask: Callable[[str], str]) -> Verdict:
        """The same with its failure passed through `mask`: failures go into logs and dumps."""
        return self if self.failure is None else replace(self, failure=mask(self.failure))

    def apply(self, sample: Sample) -> None:
        """Write it into the sample."""
        sample.reward = self.reward
        sample.reward_failure = self.failure
        if self.failure is not None:
            sample.status = Status.FAILED


def failure_kind(failure: str) -> str:
    """The failure as the last part of a metric's name."""
    return failure.partition(":")[0].replace(" ", "_")


def error_verdict(error: BaseException) -> Verdict:
    """A reward function raised."""
    return Verdict(None, f"{ERROR}: {type(error).__name__}: {error}")


def verdict_of(value: object) -> Verdict:
    """What a reward function returned: a number (also numpy's, or a 0-d tensor), or a dict of numbers."""
    if isinstance(value, dict):
        numbers = {str(key): _finite(entry) for key, entry in value.items()}
        rewards = {key: number for key, number in numbers.items() if number is not None}
        return Verdict(rewards) if numbers and len(rewards) == len(numbers) else Verdict(None, NOT_A_NUMBER)
    number = _finite(value)
    return Verdict(None, NOT_A_NUMBER) if number is None else Verdict(number)


def verdicts_of(value: object, count: int) -> list[Verdict]:
    """What a reward function returned for a group of `count`: a list (or array) of rewards, one each, in order.

    Each entry is judged by itself; where it is no list of this length, that is the one failure of all.
    """
    if isinstance(value, str | bytes | dict | set | frozenset) or not isinstance(value, Iterable):
        return [Verdict(None, f"{ERROR}: it returned a {type(value).__name__} for a group, not a list of rewards")]
    rewards = list(value)
    if len(rewards) != count:
        return [Verdict(None, f"{ERROR}: it returned {len(rewards)} rewards for a group of {count}")]
    return [verdict_of(reward) for reward in rewards]


def _finite(value: object) -> float | None:
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
