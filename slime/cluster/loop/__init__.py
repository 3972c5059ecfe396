"""Parts of the training loop, whose verbs are in `slime.cluster.cluster`.

Reading order: `loop_state` (the rollouts that the loop has in hand), `save_schedule` (when a checkpoint is due),
`progress_poll` (what the console shows while the loop waits) and `start_trackers` (the experiment trackers).
"""
