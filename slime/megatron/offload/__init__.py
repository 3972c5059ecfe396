"""Tensors that leave the device for host memory for a time.

`trainer_memory` empties a trainer that sleeps, `snapshots` keeps a reference model's weights, both in `host_memory`.
"""
