"""--use-routing-replay: there has to be a router.

Path: part of `rules`. Invariant: what passes here has a model of experts, and engines that are asked about them.
"""

from __future__ import annotations

from collections.abc import Iterable

from slime.config.rules.case import Case
from slime.config.rules.problem import Problem


def routing_replay(case: Case) -> Iterable[Problem]:
    shape = case.args.architecture
    if case.args.use_routing_replay and shape is not None and not shape.num_experts:
        rule = f"{shape.family} is a dense family: no router decides anything"
        yield case.error("use_routing_replay", rule, "leave it out", beside=["num_experts", "hf_checkpoint"])
