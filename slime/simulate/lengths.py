"""Response lengths: drawn from a log-normal distribution, or taken from the samples of a real run.

- Used by: `engines`, which asks for the length of each response when it begins.
- Invariant: a prompt and a sampling seed always give the same length. So a response that continues later keeps its
  length, one that starts again with another seed gets another, and two settings see the same responses.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

P99_SIGMAS = 2.3263478740408408
"""The 99th percentile of a normal distribution, in standard deviations."""


_NORMAL = statistics.NormalDist()


def _uniform(prompt: int, seed: int) -> float:
    """Return a number between 0 and 1, without both, that looks random and depends on the arguments alone."""
    mixed = (seed + 0x9E3779B9 * (prompt + 1)) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):  # the finalizer of splitmix64
        mixed = (mixed ^ mixed >> shift) * factor % 2**64
    return ((mixed >> 12) + 0.5) / 2**52


class Lengths(Protocol):
    """A source of lengths, in tokens."""

    @property
    def mean(self) -> float:
        """The mean length of a response."""
        ...

    @property
    def longest(self) -> int:
        """The length at which responses are cut."""
        ...

    def response(self, prompt: int, seed: int) -> int:
        """Return the length of the response to prompt number `prompt` with this sampling seed: 1 to `longest`."""
        ...

    def prompt(self, prompt: int) -> int:
        """Return the length of a prompt."""
        ...


@dataclass(frozen=True)
class LogNormal:
    """Log-normal lengths with this mean and 99th percentile before they are cut at `longest`; all in tokens.

    With the mean m and the 99th percentile q, sigma is the smaller solution of ln(q / m) = 2.326 sigma - sigma^2 / 2,
    and mu = ln m - sigma^2 / 2.

    >>> lengths = LogNormal(100.0, 400.0, 1000, prompt_length=20)
    >>> round(lengths.sigma, 3), round(math.exp(lengths.mu), 1)
    (0.697, 78.4)
    >>> round(math.exp(lengths.mu + P99_SIGMAS * lengths.sigma), 1)
    400.0
    """

    mean: float
    p99: float
    longest: int
    prompt_length: int

    @cached_property
    def sigma(self) -> float:
        """Return the standard deviation of the logarithm; 0: all lengths are equal.

        Raises:
            ValueError: no log-normal distribution has this mean and 99th percentile.
        """
        ratio = self.p99 / self.mean
        inside = P99_SIGMAS**2 - 2 * math.log(ratio) if ratio >= 1 else -1.0
        if inside < 0:
            raise ValueError(f"a 99th percentile of 1 to {math.exp(P99_SIGMAS**2 / 2):.3g} times the mean")
        return P99_SIGMAS - math.sqrt(inside)

    @cached_property
    def mu(self) -> float:
        """Return the mean of the logarithm."""
        return math.log(self.mean) - self.sigma**2 / 2

    def response(self, prompt: int, seed: int) -> int:
        drawn = math.exp(self.mu + self.sigma * _NORMAL.inv_cdf(_uniform(prompt, seed)))
        return max(1, min(self.longest, round(drawn)))

    def prompt(self, prompt: int) -> int:
        return self.prompt_length


@dataclass(frozen=True)
class RecordedGroup:
    """The lengths of one group of a real run: its prompt, and its responses."""

    prompt: int
    responses: tuple[int, ...]


class Recorded:
    """Lengths of a real run's samples. A prompt takes the responses of one recorded group, so hard prompts stay hard.

    The samples of a prompt take the group's responses in turn, each once before any is taken twice: drawn at random,
    the longest ones would be missed too often, and these decide how long a rollout takes.

    >>> lengths = Recorded([RecordedGroup(3, (10,)), RecordedGroup(4, (20, 20))], longest=15)
    >>> {lengths.response(prompt, seed) for prompt in range(4) for seed in range(9)}, lengths.mean
    ({10, 15}, 12.5)
    """

    def __init__(self, groups: Sequence[RecordedGroup], *, longest: int) -> None:
        """Take `groups`, of which there is at least one; a longer response counts as `longest`."""
        self._groups = list(groups)
        self._longest = longest
        self._orders: dict[int, list[int]] = {}
        self._turns: dict[int, dict[int, int]] = {}
        """The turn of each sampling seed, by prompt."""

    @property
    def mean(self) -> float:
        return statistics.fmean(
            statistics.fmean(min(each, self._longest) for each in group.responses) for group in self._groups
        )

    @property
    def longest(self) -> int:
        return self._longest

    def _group(self, prompt: int) -> RecordedGroup:
        """Return each group once in a row of as many prompts as there are groups, in another order every time."""
        lap, place = divmod(prompt, len(self._groups))
        if lap not in self._orders:
            self._orders[lap] = random.Random(lap).sample(range(len(self._groups)), len(self._groups))
        return self._groups[self._orders[lap][place]]

    def response(self, prompt: int, seed: int) -> int:
        responses, turns = self._group(prompt).responses, self._turns.setdefault(prompt, {})
        turn = turns.setdefault(seed, len(turns))
        return max(1, min(self._longest, responses[turn % len(responses)]))

    def prompt(self, prompt: int) -> int:
        return self._group(prompt).prompt
