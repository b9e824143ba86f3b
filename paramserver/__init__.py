"""The parameter server: flat partitions, their update rules, and the messages that reach them.

The server knows nothing of models. It holds flat vectors, applies named mini-batches to them
exactly once, and publishes every version. Nothing here imports `models`, `shuffler` or `workers`,
and only `actor.py` may import ray.
"""
