"""What follows from a configuration and the facts of a machine. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from downpour.cluster.config.policy import PolicyConfig
from downpour.workers.config import ReplicaConfig

if TYPE_CHECKING:
    pass


def num_processes(config: ReplicaConfig, num_processors: int) -> int:
    """How many processes the replicas are spread over; on GPUs, `num_processors` is their room.

    Steps of small nets are bound by the processor, so more processes than processors only add
    context switches, memory and time to start.
    """
    if config.replicas_per_process is not None:
        return -(-config.replicas // config.replicas_per_process)
    return max(1, min(config.replicas, num_processors))


def num_threads(config: PolicyConfig, num_processes: int, num_processors: int) -> int:
    """How many threads each of so many processes of replicas computes a step on.

    One where pushes are recorded: on several, matrix products round otherwise now and then while
    the machine is busy, and a replay would find other bits.
    """
    return 1 if config.record_pushes else max(1, num_processors // num_processes)


def active_replicas(config: ReplicaConfig, epochs_done: float) -> int:
    """How many replicas train after `epochs_done` epochs: the warm start, then an even ramp."""
    if epochs_done < config.warm_start_epochs:
        return 1
    if not config.ramp_epochs:
        return config.replicas
    share = min(1.0, (epochs_done - config.warm_start_epochs) / config.ramp_epochs)
    return max(1, min(config.replicas, 1 + int(share * (config.replicas - 1))))


def next_evaluation_s(
    config: PolicyConfig, began_s: float, ended_s: float, shortest_s: float = math.inf
) -> float:
    """When to score again after a scoring that took from `began_s` to `ended_s`, on one clock.

    Every `evaluate_every_s`, or as much later as keeps scoring to its share of the time. One that
    took more than twice the shortest was held up (a machine that was suspended, or busy with
    something else), and counts as twice the shortest: the wait is not what scoring costs.
    """
    took_s = min(ended_s - began_s, 2 * shortest_s)
    return max(ended_s, began_s + max(config.evaluate_every_s, took_s / config.evaluation_share))
