"""Checkpoints: written whole or not at all, checked by their digests, and read without running what is in them.

Reading order: `save_load`, `snapshot` (taken at once, written later), `staging` (its memory), `background` (its
thread), `files` (directories on the disk), `manifest` (sizes and digests), `state_arrays`, `search` (the newest sound
one), `torch_dist` (the format) and `safe_pickle` (its pickles), `rng_state`, `conversion`.
"""
