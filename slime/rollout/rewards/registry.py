r"""The built-in rewards by `--rm-type`: each reads an answer from the response, and scores it.

- Called by: `pool` checks the name at the start, and `worker` calls the function.
- Invariant: importing this module loads neither torch nor sympy, so that a worker is light.

    type        the answer                                                    its score
    deepscaler  the last box (see `boxes`) after the last </think>            1 if it equals the label, else 0
    math        the last box                                                  1 if it equals the label, else 0
    dapo        the text after the last "Answer:" near the end                1 if it equals the label, else -1
    f1          the text after </think>                                       F1 of its words and the label's
    gpqa        the text after </think>                                       1 if it chooses the right letter, else 0
    random      -                                                             0 or 1, by chance

With `boxed_<type>` the answer is the content of the response's last box, whatever the type reads otherwise; without a
box there is no answer. `remote_rm` is in `remote`: it waits for a network, and runs in no worker.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from slime.config.args import Args
from slime.config.reward_types import BOXED_PREFIX, REWARD_TYPE_REMEDY, base_type
from slime.core.boxes import Answer, boxed
from slime.core.sample import Sample
from slime.rollout.rewards.dapo import dapo_score, read_dapo
from slime.rollout.rewards.deepscaler import mathematics_score, read_boxed
from slime.rollout.rewards.f1 import f1_score
from slime.rollout.rewards.gpqa import gpqa_score
from slime.rollout.rewards.response import final_text

Reward = Callable[[Args, Sample], object]


@dataclass(frozen=True)
class Rule:
    """A rule that scores responses. `read` returns the answer in a response, or None; `score` rates the answer.

    `lowest` is the score of a wrong answer.
    """

    read: Callable[[str], Answer | None]
    score: Callable[[Args, Sample, Answer | None], float]
    lowest: float = 0.0


def _against_label(score: Callable[[Answer | None, str], float]) -> Callable[[Args, Sample, Answer | None], float]:
    return lambda args, sample, answer: score(answer, _label(sample))


def _label(sample: Sample) -> str:
    if sample.label is None:
        raise ValueError("the sample has no label; --label-key names its key in the data file")
    return sample.label


def _final(response: str) -> Answer:
    return Answer(final_text(response))


def _random(args: Args, sample: Sample, answer: Answer | None) -> float:
    """Return a random reward that depends on the seed and the sample's number: a control that teaches nothing."""
    return float(random.Random(f"{args.rollout_seed}/{sample.index}").randint(0, 1))


def _f1(args: Args, sample: Sample, answer: Answer | None) -> float:
    return f1_score(None if answer is None else answer.text, _label(sample))


def _gpqa(args: Args, sample: Sample, answer: Answer | None) -> float:
    return gpqa_score(None if answer is None else answer.text, _label(sample), sample.metadata)


RULES: Mapping[str, Rule] = {
    "deepscaler": Rule(read_boxed, _against_label(mathematics_score)),
    "math": Rule(boxed, _against_label(mathematics_score)),
    "dapo": Rule(read_dapo, _against_label(dapo_score), lowest=-1.0),
    "f1": Rule(_final, _f1),
    "gpqa": Rule(_final, _gpqa),
    "random": Rule(_final, _random),
}


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


def find_reward(rm_type: str) -> Reward:
    """Return the function of an `--rm-type`, which a worker calls.

    Raises:
        ValueError: there is no reward of this name.
    """
    rule = RULES.get(base_type(rm_type) or "")
    if rule is None:
        raise ValueError(f"--rm-type {rm_type}: no such reward in a worker; {REWARD_TYPE_REMEDY} takes your own")
    read = boxed if rm_type.startswith(BOXED_PREFIX) else rule.read
    return lambda args, sample: rule.score(args, sample, read(sample.response))
