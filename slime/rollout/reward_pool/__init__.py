"""The processes that compute rewards: `RewardPool` judges samples outside the event loop, within time limits.

Reading order: `pool` (which process judges which sample), `process` and `worker` (the two ends of one process),
`channel` (how they talk), `async_worker` (async reward functions), `verdict` and `entries` (what comes back).
"""

from slime.rollout.reward_pool.pool import RewardPool

__all__ = ["RewardPool"]
