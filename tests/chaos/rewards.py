"""The chaos run's reward: the demo's reward, which fails for one training sample in twenty.

- Used by: --custom-rm-path of both runs that `tests.chaos` compares; CHAOS_REWARDS is set for the one with faults.
- Invariant: a sample's number decides whether and how its reward fails, so a repeated run loses the same rewards.
"""

from __future__ import annotations

import hashlib
import os
import time

from slime.config.args import Args
from slime.core.sample import Sample
from slime.rollout.rewards.deepscaler import deepscaler

FAILING = 0.05
FOREVER_S = 3600.0


def judge(args: Args, sample: Sample) -> float:
    """Return deepscaler's verdict, or fail: raise, hang, or end the process.

    Evaluation has no faults: `start_rollout_id` is a training sample's.
    """
    if "CHAOS_REWARDS" in os.environ and "start_rollout_id" in sample.metadata:
        number = int.from_bytes(hashlib.blake2b(str(sample.index).encode(), digest_size=4).digest(), "big")
        if number / 2**32 < FAILING:
            fail(number % 8)
    return deepscaler(sample.response, sample.label or "")


def fail(kind: int) -> None:
    """Fail in one of three ways: one in eight hangs, one in eight dies, the others raise."""
    if kind == 0:
        time.sleep(FOREVER_S)
    if kind == 1:
        os._exit(3)
    raise RuntimeError("this reward fails")
