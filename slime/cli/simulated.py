"""Print a simulation of the run's schedule after the plan of a dry run, if --simulate asks for it.

- Called by: `cluster.main`, for train.py, train_async.py and `slime plan`.
- Invariant: the loops that are simulated are those of `cli.train` and `cli.train_async`.
"""

from __future__ import annotations

from slime.config.args import Args


def simulate_if_asked(args: Args) -> None:
    """Print the simulation that --simulate asks for.

    Raises:
        UsageError: an input of the simulation is missing or wrong.
    """
    if not args.simulate:
        return
    from slime.cli import train, train_async
    from slime.simulate.report import simulate

    print(f"\n{simulate(args, {0: train.train, 1: train_async.train})}", flush=True)
