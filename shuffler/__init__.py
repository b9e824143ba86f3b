"""Which rows each mini-batch holds, who trains on it, and how its pixels reach memory.

Layers, each usable without the next: `permutation` and `plan` (arithmetic), `lease` (a state
machine), `files`, `manifest`, `records`, `reader` (Parquet in), `decode` (pixels out), `ingest`
(datasets made). Nothing here knows of networks, gradients or the parameter server, and nothing
but `actor` knows of Ray.
"""
