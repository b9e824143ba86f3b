"""Measurements behind the claims of speed: one file a claim, raw output in `results/`.

`downpour bench NAME` runs them. They may import everything; nothing but that command, lazily,
imports them.
"""
