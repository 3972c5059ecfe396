"""Engines during a run: they restart when they die, receive weights, and share devices with the trainers.

Reading order: `engine_health` (notices that an engine has died or hangs), `engine_supervisor` (restarts it),
`weight_sync` (sends the weights) and `colocation` (who holds the memory of a shared device, with a drawing).
"""
