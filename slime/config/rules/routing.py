"""The rule for --use-routing-replay: the model must have an MoE router.

- Used by: `rules.check`.
- Invariant: a model that passes has experts whose choice the engines can report.
"""

from __future__ import annotations

from collections.abc import Iterable

from slime.config.rules.case import Case
from slime.config.rules.problem import Problem


def routing_replay(case: Case) -> Iterable[Problem]:
    """Check that the model has experts."""
    arch = case.args.architecture
    if case.args.use_routing_replay and arch is not None and not arch.num_experts:
        rule = f"{arch.family} is a dense family without MoE routers"
        yield case.error("use_routing_replay", rule, "leave it out", also=["num_experts", "hf_checkpoint"])
