"""`slime plan`: print the plan of a run, and every problem with its flags and files, without starting anything.

    slime plan run.yaml --rollout-batch-size 64

It is `slime train` with --dry-run.
"""

from __future__ import annotations

from collections.abc import Sequence

from slime.cli import train


def main(argv: Sequence[str]) -> None:
    """Print the plan of the run that `slime train` would start with these words."""
    train.main([*argv, "--dry-run"])
