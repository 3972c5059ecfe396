"""The model of one rank: Megatron-core's modules with our norms, attention and mixture of experts.

Reading order: `build` (the model from the arguments), `layers` and `layer` (of what one transformer layer consists, and
the layer), `attention` and `flash_attention` (packed sequences), `moe` (router and balance), `local_dispatch` (tokens
to experts and back), `stacked_experts` and `expert_products` (the experts), `kernels` (what is computed in one pass,
with a check against PyTorch), `hf_weights` (Hugging Face weights in and out), `main_gradients` (of the vocabulary
tables).
"""
