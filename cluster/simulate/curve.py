"""What a virtual cluster has learned: accuracy by virtual time and by examples. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from downpour.paramserver.partition.staleness import Histogram


@dataclass(frozen=True, kw_only=True)
class ScoredPoint:
    """One scoring."""

    seconds: float
    """Of virtual time since the run began."""
    examples: int
    """That every partition has applied."""
    updates: int
    """Of the partition that has had fewest."""
    accuracy: float
    """Of the evaluation split, in [0, 1]."""
    loss: float
    """Mean loss on it."""


@dataclass(kw_only=True)
class LearningCurve:
    """All scorings of one run, and what it was like."""

    name: str
    """Of the setting."""
    epoch_examples: int
    """Examples of an epoch."""
    points: list[ScoredPoint] = field(default_factory=list)
    """In their order."""
    staleness: Histogram = field(default_factory=Histogram)
    """Of all updates, over all partitions."""
    seconds: float = 0.0
    """Of virtual time, until its end."""
    batches_computed: int = 0
    """Mini-batches whose gradients were computed, those that came to nothing among them."""
    batches_applied: int = 0
    """Mini-batches that every partition has applied."""
    dropped: int = 0
    """Pushes that were dropped as stale or late, over all partitions."""
    repeated: int = 0
    """Pushes of mini-batches that a partition had settled before."""
    refused: int = 0
    """Mini-batches refused, because their loss or gradient was no good."""
    deaths: int = 0
    """Processes and partitions that died."""
    finished: bool = False
    """Whether every mini-batch of every epoch was settled."""

    @property
    def best(self) -> ScoredPoint | None:
        """The scoring with the highest accuracy, the first if there are several."""
        return max(self.points, key=lambda point: point.accuracy, default=None)

    def reached(self, goal: float) -> ScoredPoint | None:
        """The first scoring with at least this accuracy; None if there is none."""
        return next((point for point in self.points if point.accuracy >= goal), None)

    def as_plain(self, goals: Sequence[float]) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "setting": self.name,
            "goals": [{"accuracy": goal, **self._when(self.reached(goal))} for goal in goals],
            "best_accuracy": None if self.best is None else self.best.accuracy,
            "seconds": self.seconds,
            "epoch_examples": self.epoch_examples,
            "batches_computed": self.batches_computed,
            "batches_applied": self.batches_applied,
            "dropped": self.dropped,
            "repeated": self.repeated,
            "refused": self.refused,
            "deaths": self.deaths,
            "finished": self.finished,
            "staleness": {
                **self.staleness.summary(),
                "histogram": [[low, n] for low, n in self.staleness.bars],
            },
            "scorings": [
                {
                    "seconds": point.seconds,
                    "examples": point.examples,
                    "updates": point.updates,
                    "accuracy": point.accuracy,
                    "loss": point.loss if math.isfinite(point.loss) else None,
                }
                for point in self.points
            ],
        }

    def _when(self, point: ScoredPoint | None) -> dict[str, float | int | None]:
        if point is None:
            return {"seconds": None, "examples": None, "epochs": None}
        epochs = point.examples / self.epoch_examples
        return {"seconds": point.seconds, "examples": point.examples, "epochs": epochs}
