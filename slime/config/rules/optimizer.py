"""What the optimizer's flags have to be to each other.

Path: one of the rules. Invariant: what passes here, Megatron builds.
"""

from __future__ import annotations

from collections.abc import Iterable

from slime.config.rules.case import Case
from slime.config.rules.problem import Problem


def optimizer(case: Case) -> Iterable[Problem]:
    if case.args.use_distributed_optimizer and case.args.optimizer != "adam":
        rule = f"Megatron shards adam alone, not --optimizer {case.args.optimizer}"
        yield case.error("use_distributed_optimizer", rule, "leave one of the two out", beside=["optimizer"])
