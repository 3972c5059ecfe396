"""The rule for --simulate, which belongs to a dry run.

- Used by: `rules.check`.
- Invariant: a command line that asks for a simulation never starts a run.
"""

from __future__ import annotations

from collections.abc import Iterable

from slime.config.problem import Problem
from slime.config.rules.case import Case


def simulation(case: Case) -> Iterable[Problem]:
    """Check that nothing is started when a simulation is asked for."""
    if case.args.simulate and not case.args.dry_run:
        rule = "simulates the run and starts nothing, but this is no dry run"
        yield case.error("simulate", rule, "use slime plan, or add --dry-run", also=["dry_run"])
