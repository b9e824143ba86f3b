"""BN statistics that each replica would keep by itself, from the pushes of a run.

They are moving averages by the server's rule over one replica's own mini-batches. A framework keeps
these if each replica has batch normalization layers of its own. Not here: the pushes, and what is
done with the averages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from downpour.paramserver.rules.statistics import BatchStatistics, StatisticsRule


class LocalStatistics:
    """Moving averages of each replica's own moments."""

    def __init__(self, *, num_replicas: int, num_features: int, rule: StatisticsRule) -> None:
        """Start each replica with mean 0 and variance 1."""
        self._kept = torch.zeros(num_replicas, 2, num_features)
        self._kept[:, 1] = 1.0
        self._rules = [BatchStatistics(num_features, rule) for _ in range(num_replicas)]

    def take(self, replica: int, moments: Tensor) -> None:
        """Merge the moments of a push.

        Args:
            replica: who pushed.
            moments: count, mean and unbiased variance of each feature of the push's `n`
                mini-batches, float32 `[n, 3, F]`.
        """
        kept = self._kept[replica]
        for i in range(len(moments)):
            self._rules[replica].update(kept, moments[i], kept)

    @property
    def replicas(self) -> tuple[int, ...]:
        """The replicas that have pushed."""
        return tuple(r for r, rule in enumerate(self._rules) if rule.num_updates)

    def of(self, replica: int) -> Tensor:
        """Return a replica's mean and unbiased variance, float32 `[2, F]`."""
        return self._kept[replica]

    def averaged(self) -> Tensor:
        """Return the means and the variances, averaged over replicas that have pushed: `[2, F]`."""
        return self._kept[list(self.replicas)].mean(dim=0)
