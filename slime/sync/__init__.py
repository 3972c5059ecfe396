"""Weights from the trainers to the engines.

Reading order: `transport` (the handshake that all ways of sending share, with a drawing), `buckets`, then one module
for each way: `broadcast` (a process group, with buckets `in_flight`), `owners` (the same from every pipeline stage and
expert rank, in turns), `colocate` (memory of a shared device) and `disk` (files, in a `weight_directory`). `open`
chooses between them. `sender` is a trainer's side of all syncs: `finite` checks what is sent, and `proof` what has
arrived.
"""
