"""Those who use the server: model replicas with their concurrent steps, and the evaluator.

Here models, mini-batches and the parameter server's client come together. Only `actor.py` may
import ray; nothing here imports `cluster`.
"""
