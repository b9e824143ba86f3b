"""`downpour bench learning`: time and examples to a stated accuracy, side by side.

`peers` says who is compared and which settings each may have, `search` finds the best of them,
`run` trains one peer once, `curve` is what comes of that, `benchmark` puts all together, and `plot`
draws it. The training loops of the others are in `benchmarks.baselines`.
"""
