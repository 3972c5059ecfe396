"""Ray: which process runs where, how long it lives, and how the training loop calls it.

Reading order: `main` (from a command line to a run), `restart` (after a fault), `cluster` (the verbs of the loop, with
a drawing of the asynchronous one), `actors` and `placement` (start and place everything), `workers` and
`rollout_manager` with its halves `data_side` and `engine_side` (the actors), `colocation`, `engine_supervisor`,
`engine_health` and `weight_sync` (engines that die, and their weights), then `ray_wait`, `watchdog` and `reaper`
(nothing waits for ever, and no process is left over).
"""
