"""Parts of the training loop, whose verbs are in `slime.cluster.cluster`.

Reading order: `loop_state` (the rollouts that the loop has in hand), `journal` (times and metrics of its steps),
`saving` and `save_schedule` (checkpoints), `evaluations`, `progress_poll` (what the console shows while the loop waits)
and `start_trackers` (the experiment trackers).
"""
