"""The dry run: the plan of a run as a table, the memory of each device, and whether it fits.

Reading order: `summary` (the text of --dry-run), `memory_notes` (its remarks on memory), `memory_model` (bytes by
kind), `activations` and `moe_activations` (what each operation of a forward pass keeps), `rank` (the sizes that these
are computed from), `fit` (comparison with a GPU, and what would help).
"""
