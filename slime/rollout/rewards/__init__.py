"""The graders of `--rm-type`: each reads an answer from a response and scores it.

Reading order: `reward` (the record that each file ends with), then any one: `deepscaler` and `dapo` with `mathematics`
and `answers` (two texts as mathematics), `gpqa` with `letters` and `letter_patterns`, `f1`, `chance`,
`response` (where an answer is in a response), `remote` (over HTTP), `code` (runs the response's code in the sandbox). A
new one is a file here and a row in `slime.config.reward_types`.
"""
