"""`slime eval`: evaluate a model on the evaluation sets of a run, without training.

    slime eval run.yaml --hf-checkpoint HF_DIR

It is `slime train` with --num-rollout 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from slime.cli import train


def main(argv: Sequence[str]) -> None:
    """Evaluate once with the flags of a run."""
    train.main([*argv, "--num-rollout", "0"])
