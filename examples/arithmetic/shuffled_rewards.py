"""The demo's control, under the path that its first version had: see slime/cli/arithmetic/shuffled_rewards.py."""

from __future__ import annotations

from slime.cli.arithmetic.shuffled_rewards import shuffle

__all__ = ["shuffle"]
