"""Making samples: from a prompt to a judged response, and from groups of responses to a batch.

Reading order: `collect` (the loop of one rollout, with a drawing), `group` (one group: generate, then judge),
`generate` and `endings` (one response, in one or several parts), `acceptance` and `waves` (which groups are kept),
`data_buffer`, `prompts` and `in_flight` (where prompts come from, and where leftovers go), `evaluate`, `rewards` (the
graders) and `reward_pool` (the processes that run them). `context` holds what every one of these functions receives.
"""
