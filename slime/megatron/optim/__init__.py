"""The optimizer: Megatron's, with PyTorch's Adam, on the device or in host memory.

Reading order: `optimizer` (which one, its step and its schedule), `adam` (corrections to Megatron's, and a step in one
pass), `multi_tensor` (passes over all tensors, fused on a GPU), `cpu_offload` (--optimizer-cpu-offload),
`optimizer_state` (its part of a checkpoint), `flat_shares` (each rank's share of it).
"""
