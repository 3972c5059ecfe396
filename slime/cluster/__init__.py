"""Ray: which process runs where, how long it lives, and how the training loop calls it.

Reading order: `program` (from a command line to a run), `recovery` (restarts after a fault), `cluster` (the verbs of
the loop, with a drawing of the asynchronous one), `processes` and `placement` (start and place everything), `workers`
and `rollout_manager` (the actors), `turns` (colocation), `fleet`, `health` and `mending` (the supervisor of the engines
and their weights), then `waiting`, `watchdog` and `reaper` (nothing waits for ever, and no process is left over).
"""
