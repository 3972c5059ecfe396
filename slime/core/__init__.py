"""The types that every other package shares: standard library, numpy and torch only.

Read in this order: `sample` (one prompt and its response), `list_fields` (its numbers: arrays that read as lists),
`sample_columns` (samples as arrays, for a checkpoint), `batch` (samples as columns of arrays, for training), `packing`
(rows cut into optimizer steps, ranks and micro-batches), `rank_batch` (what one rank gets of them), `architecture`
(the sizes of a model), `weight_parts` (what one rank can send of its weights), `plugins` (user code by dotted path),
`errors` (what ends a run), `verbs` (what a training loop is written in). The rest are small tools: addresses, boxes in
answers, tests of code, masking of secrets, process guard, turns of an event loop.
"""
