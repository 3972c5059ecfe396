"""Equality of answers, without ever evaluating a model's text as code.

Reading order: `characters` (one spelling for each sign), `tokens` (numbers, letters, words; `vocabulary` has the
tables), `trees` and `expressions` (a tree of arithmetic), `exact`, `numerics` and `equality` (equality of two trees),
`cutting`, `units` and `structure` (sets, tuples, equations, units around the trees), `lists` and `parts`, `regions`
(inequalities and intervals), `library` (integrals), `comparison` (equality of two structures).
"""
