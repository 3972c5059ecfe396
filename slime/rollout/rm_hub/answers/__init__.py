"""Equality of answers, without a model's text ever being evaluated as code.

Reading order: `characters` (one spelling for each sign), `tokens` (numbers, letters, words), `expressions` (a tree of
arithmetic), `numerics` (equality of two trees), `structure` (sets, tuples, equations, units around the trees),
`regions` (inequalities and intervals), `comparison` (equality of two structures).
"""
