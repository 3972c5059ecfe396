"""Engines during a run: they restart when they die, receive weights, and share devices with the trainers.

Reading order: `engine_health` (notice that one has died or hangs), `engine_supervisor` (restart it), `weight_sync` (send
weights to those that are there) and `colocation` (who holds the memory of a shared device, with a drawing).
"""
