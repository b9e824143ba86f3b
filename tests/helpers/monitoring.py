"""What monitoring is told of a run, and a run's folder with some of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

VALUES = {
    "elapsed_s": 3.0,
    "updates": 100,
    "examples": 3200,
    "epoch": 0.05,
    "updates_per_s": 50.0,
    "learning_rate": 0.1,
    "staleness_mean": 4.0,
    "staleness_p99": 9.0,
    "replicas_alive": 2,
    "duplicates": 0,
    "refused": 0,
    "loss": 1.5,
}


def partition(index: int, version: int) -> Any:
    """A report of a partition, as far as metrics look at it."""
    return SimpleNamespace(
        index=index,
        version=version,
        connections=2,
        drift=0.1,
        duplicates=1,
        refused=0,
        dropped=2,
        malformed=0,
        staleness={0: [3, 4], 1: [1, 0, 5]},
    )
