"""The dry run: the plan of a run as a table, the memory of each device, and whether it fits.

Reading order: `summary` (the text of --dry-run), `memory_model` (bytes by kind), `activations` (what each operation of
a forward pass keeps), `fit` (comparison with a GPU, and what would help).
"""
