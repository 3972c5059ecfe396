"""The optimizer: Megatron's, with PyTorch's Adam, on the device or in host memory.

Reading order: `optimizer` (which one, and its schedule), `distributed_optimizer` (corrections to Megatron's),
`one_pass_adam` and `multi_tensor` (fused on a GPU), `cpu_offload` (--optimizer-cpu-offload), `optimizer_state` (its
part of a checkpoint).
"""
