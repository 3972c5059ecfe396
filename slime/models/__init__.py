"""The model families: what their config.json and flags mean, and how Hugging Face's and Megatron's weights correspond.

Read in this order: `mapping` (rules that work in both directions), `decoder` (the rules that families share),
`family` (the record that each family fills in), one family (`glm4_moe` is the most complete), `families` (the
registry), `hf_files` (reading and writing HF directories), `hf_identity` (whether two HF directories are the same to a
run).
"""
