"""Verdict: the result of judging one sample, a reward or a failure.

- Used by: a reward worker makes it, or the pool if the worker fails; `collect` writes it into the Sample.
- Invariant: it holds either a finite reward or the reason why there is none, never a silent 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from slime.core.sample import Sample, Status
from slime.rollout.reward_pool.entries import finite, plain_entries, plain_text
from slime.rollout.rewards.reward import Scored

TIMEOUT = "timeout"
CRASH = "crash"
MEMORY = "memory"
NOT_A_NUMBER = "not a number"
NO_ENTRY = "no reward key"
ERROR = "error"
CODE_VERDICT = "code_verdict"
"""The key of a code's verdict in a sample's metadata."""


@dataclass(frozen=True)
class Verdict:
    """A reward or a failure. `failure` begins with one of the words above, and may continue after a colon.

    `reward` is a number, or a dict of plain data whose entry under --reward-key is a number.
    """

    reward: float | dict[str, Any] | None
    failure: str | None = None
    code_verdict: str | None = None
    """The word of `--rm-type code` for how the response's code has done; kept in the sample's metadata."""

    def masked(self, mask: Callable[[str], str]) -> Verdict:
        """Return the verdict with its texts passed through `mask`, because they go into logs and dumps."""
        failure = None if self.failure is None else mask(self.failure)
        return replace(self, failure=failure, reward=_masked(self.reward, mask))

    def apply(self, sample: Sample) -> None:
        """Write the verdict into the sample."""
        sample.reward = self.reward
        sample.reward_failure = self.failure
        if self.code_verdict is not None:
            sample.metadata = {**sample.metadata, CODE_VERDICT: self.code_verdict}
        if self.failure is not None:
            sample.status = Status.FAILED


def failure_kind(failure: str) -> str:
    """Return the failure as the last part of a metric's name."""
    return failure.partition(":")[0].replace(" ", "_")


def error_verdict(error: BaseException) -> Verdict:
    """Return the verdict of a reward function that raised `error`."""
    try:
        text = str(error)
    except Exception as another:  # noqa: BLE001 (a user's exception may not even have a text)
        text = f"(its text raised a {type(another).__name__})"
    return Verdict(None, plain_text(f"{ERROR}: {type(error).__name__}: {text}"))


def verdict_of(value: object, key: str | None = None) -> Verdict:
    """Judge a returned value: a number (also numpy's, or a 0-d tensor), or a dict with a number under `key`.

    `key` is --reward-key. The dict's other entries are kept as far as they are plain data. Without a key the dict is
    kept as it is, and `Sample.reward_value` later raises an error that names what is missing.
    """
    if isinstance(value, Scored):
        return Verdict(value.value, code_verdict=value.verdict)
    if isinstance(value, Mapping):
        return _verdict_of_entries(cast(Mapping[Any, Any], value), key)
    number = finite(value)
    return Verdict(None, NOT_A_NUMBER) if number is None else Verdict(number)


def _verdict_of_entries(entries: Mapping[Any, Any], key: str | None) -> Verdict:
    if not entries:
        return Verdict(None, NOT_A_NUMBER)
    try:
        kept = plain_entries(entries)
    except ValueError as error:
        return Verdict(None, f"{NOT_A_NUMBER}: {error}")
    if key is None:
        return Verdict(kept)
    found = [entry for name, entry in entries.items() if str(name) == key]
    if not found:
        named = f"the reward is a dict with the keys {_some(kept)}, and --reward-key is {key!r}"
        return Verdict(None, f"{NO_ENTRY}: {named}")
    number = finite(found[0])
    if number is None:
        shown = plain_text(repr(kept.get(key)))[:80]
        return Verdict(None, f"{NOT_A_NUMBER}: the reward dict has {shown} under {key!r} (--reward-key)")
    return Verdict(kept | {key: number})


def _some(keys: Iterable[str]) -> str:
    """Return the first few of many keys as text."""
    named = [repr(key[:40]) for key in keys]
    return ", ".join(named[:10]) + (f" and {len(named) - 10} more" if len(named) > 10 else "")


def _masked(value: Any, mask: Callable[[str], str]) -> Any:
    match value:
        case str():
            return mask(value)
        case list():
            return [_masked(item, mask) for item in cast(list[Any], value)]
        case dict():
            return {mask(key): _masked(item, mask) for key, item in cast(dict[str, Any], value).items()}
        case _:
            return value


def verdicts_of(value: object, count: int, key: str | None = None) -> list[Verdict]:
    """Judge the value returned for a group of `count` samples: a list (or array) with one reward each, in order.

    Each entry is judged by itself. If the value is no list of this length, the result is one failure for all.
    """
    if isinstance(value, str | bytes | Mapping | set | frozenset) or not isinstance(value, Iterable):
        return [Verdict(None, f"{ERROR}: it returned a {type(value).__name__} for a group, not a list of rewards")]
    rewards = list(value)
    if len(rewards) != count:
        return [Verdict(None, f"{ERROR}: it returned {len(rewards)} rewards for a group of {count}")]
    return [verdict_of(reward, key) for reward in rewards]


def summed(parts: Mapping[str, Verdict], weights: Sequence[float], key: str) -> Verdict:
    """Return the weighted sum of several functions' verdicts on one sample; `parts` has them by function name.

    The reward is a dict with the sum under `key` and the number of each function under its name. Other entries of a
    function that returned a dict follow as NAME/ENTRY. If a function has failed, there is no sum, and the failure names
    that function.

    >>> summed({"right": Verdict(1.0), "short": Verdict(0.5)}, [1.0, 0.1], "sum").reward
    {'right': 1.0, 'short': 0.5, 'sum': 1.05}
    >>> summed({"right": Verdict(1.0), "short": Verdict(None, "timeout")}, [1.0, 0.1], "sum").failure
    'timeout: in short'
    """
    entries: dict[str, Any] = {}
    total = 0.0
    for (name, part), weight in zip(parts.items(), weights, strict=True):
        if part.failure is not None:
            kind, colon, detail = part.failure.partition(": ")
            return Verdict(None, f"{kind}: in {name}{colon}{detail}")
        number = part.reward
        if isinstance(number, dict):
            number, others = number[key], number
            entries |= {f"{name}/{entry}": value for entry, value in others.items() if entry != key}
        assert number is not None, "a verdict without a failure has a reward"
        entries[name] = float(number)
        total += weight * float(number)
    if finite(total) is None:
        return Verdict(None, f"{NOT_A_NUMBER}: the weighted sum is {total}")
    return Verdict(entries | {key: total})


def check_own_reward(sample: Sample, key: str | None) -> None:
    """Check the reward that a generate function has given the sample, if any, and write the verdict into it."""
    if sample.reward is not None:
        verdict_of(sample.reward, key).apply(sample)
