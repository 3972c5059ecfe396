"""Making samples: from a prompt to a judged response, and from groups of responses to a batch.

Reading order: `context` (what all rollout functions receive), `collect` (the loop of one rollout, with a drawing),
`group` (one group: generate, then judge), `generate` and `endings` (one response, in one or several parts),
`multi_turn` (several turns in one response), `token_text` (their text),
`acceptance`, `filter_hub`, `waves` and `sample_failures` (which groups are kept, and when a run gives up),
`data_buffer` and `in_flight` (where prompts come from, and where leftovers go), `ahead` (the rollout that is generated
while another is trained on), `prompts`, `chat_template` and `tokenizer` (from a data file to tokens), `evaluate`,
`sft_rollout` (no engines), `dump` (replays), `metrics` and `intervals`, `progress` (counts for the console),
`rewards` (the graders) and `reward_pool` (the processes that run them).
"""
