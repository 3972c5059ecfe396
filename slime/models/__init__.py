"""Weight tables: how each model family's Hugging Face tensors and Megatron's parameters correspond.

Read in this order: `mapping` (rules that work in both directions), `decoder` (the rules that families share), one
family (`glm4` is the most complete), `families` (the registry), `hf_files` (reading and writing HF directories),
`hf_identity` (whether two HF directories are the same to a run).
"""
