r"""`Reward`: what distinguishes one built-in reward from another, and how the reward of an --rm-type is found.

- Called by: `pool` checks the name at the start, and `worker` calls the function. A file of this folder ends with its
  record, `REWARD = Reward(...)`, and a row of `slime.config.reward_types` names the file.
- Invariant: importing any of the records loads neither torch nor sympy, so that a worker is light.

With `boxed_<type>` the answer is the content of the response's last box, whatever the type reads otherwise; without a
box there is no answer. `remote_rm` is in `remote`: it waits for a network, and runs in no worker.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module

from slime.config.args import Args
from slime.config.reward_types import BOXED_PREFIX, REWARD_TYPES, facts_of, reward_type_remedy
from slime.core.boxes import Answer, boxed
from slime.core.sample import Sample


@dataclass(frozen=True)
class Scored:
    """A score with a word for why it is what it is, which goes into the sample's metadata and into metrics."""

    value: float
    verdict: str


RewardFunction = Callable[[Args, Sample], float | Scored]


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A rule that scores responses."""

    read: Callable[[str], Answer | None]
    """Returns the answer in a response, or None if there is none."""
    score: Callable[[Args, Sample, Answer | None], float | Scored]
    """Scores the answer, or raises; it runs in a worker process, under a time limit."""
    lowest: float = 0.0
    """The score of a wrong answer."""
    reports_format: bool = False
    """Whether evaluation reports the share of responses with an answer, as the metric `format`."""


def against_label(score: Callable[[Answer | None, str], float]) -> Callable[[Args, Sample, Answer | None], float]:
    """Return `score(answer, label)` as a function for `Reward.score`."""
    return lambda args, sample, answer: score(answer, label_of(sample))


def label_of(sample: Sample) -> str:
    """Return the sample's label.

    Raises:
        ValueError: it has none.
    """
    if sample.label is None:
        raise ValueError("the sample has no label; --label-key names its key in the data file")
    return sample.label


def reward_type(args: Args, sample: Sample, rm_type: str | None = None) -> str | None:
    """Return the type that judges the sample: its metadata goes first, then `rm_type` (a data set's), then --rm-type.

    The result is None with --custom-rm-path, and if nothing names a type.
    """
    if args.custom_rm_path is not None:
        return None
    return sample.metadata.get("rm_type") or rm_type or args.rm_type


def is_async(function: object) -> bool:
    """Return whether it is an `async def` (or its __call__ is), so that many calls can wait at the same time."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def reward_of(rm_type: object) -> Reward | None:
    """Return the record of a type; None if the type is unknown, or a judge at --rm-url scores it.

    Raises:
        ValueError: the module in the type's row has no `REWARD`.
    """
    facts = facts_of(rm_type)
    if facts is None or facts.module is None:
        return None
    reward = vars(import_module(facts.module)).get("REWARD")
    if not isinstance(reward, Reward):
        raise ValueError(f"--rm-type {rm_type}: {facts.module} has no Reward named REWARD")
    boxed_only = isinstance(rm_type, str) and rm_type.startswith(BOXED_PREFIX)
    return replace(reward, read=boxed, reports_format=False) if boxed_only else reward


def load_rewards() -> None:
    """Import the record of every type, so that no sample's time limit includes that."""
    for name in REWARD_TYPES:
        reward_of(name)


def find_reward(rm_type: str) -> RewardFunction:
    """Return the function of an `--rm-type`, which a worker calls.

    Raises:
        ValueError: there is no reward of this name.
    """
    reward = reward_of(rm_type)
    if reward is None:
        raise ValueError(f"--rm-type {rm_type}: no such reward in a worker; {reward_type_remedy()} takes your own")
    return lambda args, sample: reward.score(args, sample, reward.read(sample.response))
