"""The graders of `--rm-type`: each reads an answer from a response and scores it.

Reading order: `registry` (the table of all of them), then any one: `math` and `deepscaler` through `mathematics` and
`answers` (two texts as mathematics), `dapo`, `f1`, `gpqa`, `remote`. A new one is a file here and a row in `registry`.
"""
