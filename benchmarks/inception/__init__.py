"""`downpour bench inception`: images a second of BN-Inception on processors, beside plain loops.

`benchmark` puts all together, `plain` has the plain loops, and `floor` counts what a step must
multiply and move and measures how fast this machine does either.
"""
