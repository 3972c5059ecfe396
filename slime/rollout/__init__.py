"""Making samples: from a prompt to a judged response, and from groups of responses to a batch.

Reading order: `collect` (the loop of one rollout, with a drawing), `group_run` (one group: generate, then judge),
`generate` and `endings` (one response, in one or several parts), `acceptance` and `waves` (which groups are kept),
`data_buffer`, `prompts` and `in_flight` (where prompts come from, and where leftovers go), `evaluate`, and `rm_hub`
(rewards and the pool of processes that computes them). `context` holds what every one of these functions receives.
"""
