"""The two halves of the rollout manager, which is one Ray actor (`slime.cluster.rollout_manager`).

Reading order: `data_side` (prompts, rewards, the training batch, the state that is saved), `engine_side` (the run's own
engines, external ones, or none) and `abortable` (work that a stop may end early).
"""
