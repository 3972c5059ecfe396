"""The scheduler without devices: a run's own policy on a virtual clock, with engines and trainers that only take time.

Reading order: `clock` (an event loop whose time jumps), `lengths` (how long responses are), `speeds` (how fast devices
are, and where each number comes from), `engines`, `trainers` and `pipeline` (what takes time), `rollouts` (the real
collector with these engines), `loop` (the verbs of the training loop), `recorded` (a real run as input), `study` (which
runs are compared), `tables` (what is printed), `report` (all of it, for `slime plan --simulate`).
"""
