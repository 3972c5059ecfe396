"""The math of the algorithms on plain tensors: no parallelism, no model, no I/O.

Read in this order: `advantages/grpo` (a rewarded group becomes advantages), `surrogates` (the clipped policy loss),
`losses` (what is added to it), `reducers.loss_weights` (the denominator), `corrections` (tokens from an older policy).
`estimators` is the table of what each value of --advantage-estimator uses.
"""
