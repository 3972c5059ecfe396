"""`--rm-type random`: a reward of 0 or 1 by chance, which teaches nothing. It is a control.

- Called by: `reward` finds it in the table of types.
- Invariant: a reward depends only on the seed and the sample's number, so that a run can be repeated.
"""

from __future__ import annotations

import random

from slime.config.args import Args
from slime.core.boxes import Answer
from slime.core.sample import Sample
from slime.rollout.rewards.response import final_answer
from slime.rollout.rewards.reward import Reward


def chance(args: Args, sample: Sample, answer: Answer | None) -> float:
    """Return 0 or 1 by chance."""
    return float(random.Random(f"{args.rollout_seed}/{sample.index}").randint(0, 1))


REWARD = Reward(read=final_answer, score=chance)
