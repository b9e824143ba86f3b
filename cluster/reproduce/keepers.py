"""BN statistics as others than the server would keep them, from the pushes of a run.

Each replica's moving averages are those of the server's rule over the replica's own mini-batches:
what a framework keeps whose replicas each have batch normalization layers of their own. Here: the
averages. Not here: where pushes come from, and what is made of the averages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from downpour.paramserver.rules.statistics import BatchStatistics, StatisticsRule


class Keepers:
    """Moving averages of every replica, beside those that the server keeps of all."""

    def __init__(self, *, num_replicas: int, num_features: int, rule: StatisticsRule) -> None:
        """Nothing seen yet: mean 0 and variance 1."""
        self._kept = torch.zeros(num_replicas, 2, num_features)
        self._kept[:, 1] = 1.0
        self._rules = [BatchStatistics(num_features, rule) for _ in range(num_replicas)]

    def take(self, replica: int, moments: Tensor) -> None:
        """Merge a push's `moments` [n, 3, F] (count, mean, unbiased variance) of `replica`."""
        kept = self._kept[replica]
        for i in range(len(moments)):
            self._rules[replica].update(kept, moments[i], kept)

    @property
    def replicas(self) -> tuple[int, ...]:
        """Those that have pushed anything."""
        return tuple(r for r, rule in enumerate(self._rules) if rule.num_updates)

    def of(self, replica: int) -> Tensor:
        """A replica's own statistics [2, F]."""
        return self._kept[replica]

    def averaged(self) -> Tensor:
        """The mean [2, F] over those replicas that have pushed: of means, and of variances."""
        return self._kept[list(self.replicas)].mean(dim=0)
