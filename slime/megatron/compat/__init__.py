"""Compatibility with the installed Megatron-core, with CUDA or without it.

Reading order: `version` (the one that is supported), `names` (a row of the table), `patches` and `optimizer_patches`
(the table of every private name that is replaced or relied on), `apply` (checks the table and makes changes),
`cpu_layer` (Megatron without CUDA). `uncompiled` is installed before Megatron is imported, and `hidden_trackers` is how
it is imported.
"""
