"""The arguments of a run: every flag, resolved once, checked before anything starts, and frozen.

Reading order: `args` (the values, and what follows from them), `flags` (their declarations), `parse` (from the command
line to Args), `resolve` (open values), `architecture` (the model, from config.json and MODEL_ARGS), then `rules`
(`case`, `check`). Only `parse` and `rules` themselves import rules.
"""
