"""What makes this code run on the Megatron-core that is installed, with CUDA or without it.

Reading order: `version` (the one that is supported), `uncompiled` and `lazy_wandb` (installed before it is imported).
"""
