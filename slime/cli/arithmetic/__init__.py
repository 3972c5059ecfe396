"""The demo's task, two-digit sums, and its two runs.

Reading order: `make_task` (model, tokenizer and problems), sft.yaml (the supervised start), grpo.yaml (reinforcement
learning), `shuffled_rewards` (the control that must not learn).
"""
