"""Tensors that leave the device for host memory for a time.

`host_memory` has the memory itself, and snapshots of a reference model's weights; `trainer_memory` empties a trainer
that sleeps.
"""
