"""Rewards: `RewardPool` judges samples by `--rm-type` or `--custom-rm-path`."""

from slime.rollout.rm_hub.pool import RewardPool

__all__ = ["RewardPool"]
