"""The kinds of engines that a run can start, one file each: `kind` is their common record, then `sglang`, `embedded`.

A kind is one file here, which ends with its record `KIND`, and one row of `ENGINE_KINDS` in
`slime.config.engine_kinds`, which makes it a choice of --rollout-engine and names the file.
"""
