"""Ray: which process runs where, how long it lives, and how the training loop calls it.

Reading order: `main` (from a command line to a run), `restart` (after a fault), `running` (start and end of an
attempt), `cluster` (the verbs of the loop, with a drawing of the asynchronous one), `local_ray` and `ray_session`
(which Ray, and what guards it), `placement` and `actors` (place and start everything), `workers` with `training_rank`,
and `rollout_manager` with its halves `data_side` and `engine_side` (the actors), `colocation` (with a drawing),
`engine_supervisor`, `engine_health` and `weight_sync` (engines that die, and their weights). `ray_wait`, `watchdog`,
`stopped`, `run_files` and `reaper` see to it that nothing waits for ever and no process is left over; `start_trackers`
opens the experiment trackers, `progress_poll` fetches what the console shows, and `ending` writes the closing lines.
"""
