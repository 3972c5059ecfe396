"""Ray: which process runs where, how long it lives, and how the training loop calls it.

Reading order, the path of a run: `main` (from a command line to a run), `running` (start and end of an attempt),
`actors` (starts every process), `cluster` (the verbs of the loop, with a drawing of the asynchronous one), `workers`
with `training_rank`, and `rollout_manager` (the actors). Folders: `loop` (parts of the training loop), `on_ray` (which
Ray, who runs where, and how the driver waits), `engines` (they restart, receive weights, share devices), `manager` (the
halves of the rollout manager) and `life` (who lives and dies: signals, restarts, guards).
"""
