"""The processes that compute rewards: `RewardPool` judges samples outside the event loop, within time limits.

Reading order: `pool` (what callers see), `dispatcher` (which process judges which sample), `process` and `worker` (the
two ends of one process), `channel` (how they talk), `async_worker` (async reward functions), `verdict` and `entries`
(what comes back).

This file imports nothing, because a worker is to load the reward function and little else.
"""
