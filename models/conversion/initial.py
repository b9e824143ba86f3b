"""The BN statistics that a model is made with: fresh ones, or those of an earlier training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from downpour.models.batchnorm import BatchNorm
from downpour.models.layout import FeatureEntry


@dataclass(frozen=True, kw_only=True, eq=False)
class InitialStatistics:
    """What a run's moving averages start from, for each feature."""

    statistics: Tensor
    """float32 `[2, F]`: mean and variance."""
    seen: Tensor
    """float64 `[F]`: mini-batches that they are the average of. A plain average goes on from there;
    inf says that they came without a count, and are not to be overwritten by the first."""
    momentum: Tensor
    """float64 `[F]`: the layer's own momentum, 0 for the plain average; -1 leaves it to the run.
    """

    def table(self, statistics: Tensor) -> Tensor:
        """float64 `[4, F]`: mean and variance of `statistics`, `[2, F]`, then seen and momentum.

        `statistics` may be others than the model was made with; then nobody counted them.
        """
        same = (statistics == self.statistics).all(0)
        seen = torch.where(same, self.seen, math.inf)
        return torch.cat([statistics.double(), torch.stack([seen, self.momentum])])


def initial_statistics(
    layers: Sequence[tuple[FeatureEntry, BatchNorm]],
) -> InitialStatistics:
    """Those of a model's BN layers, each with its place; on the meta device, fresh ones."""
    num_features = layers[-1][0].stop if layers else 0
    # Named, since a model may be built where the meta device is the default.
    here = torch.device("cpu")
    statistics = torch.zeros(2, num_features, device=here)
    statistics[1] = 1
    seen = torch.zeros(num_features, dtype=torch.float64, device=here)
    momentum = torch.full((num_features,), -1.0, dtype=torch.float64, device=here)
    for feature, layer in layers:
        columns = slice(feature.start, feature.stop)
        if layer.own_momentum:
            momentum[columns] = 0.0 if layer.momentum is None else layer.momentum
        if layer.running_mean.is_meta:
            continue
        statistics[0, columns] = layer.running_mean.detach()
        statistics[1, columns] = layer.running_var.detach()
        seen[columns] = _seen(layer)
    return InitialStatistics(statistics=statistics, seen=seen, momentum=momentum)


def _seen(layer: BatchNorm) -> float:
    if layer.own_momentum and layer.momentum == 0:
        return math.inf  # they never change
    count = int(layer.num_batches_tracked)
    if layer.own_momentum and layer.momentum is None:
        return count  # PyTorch's plain average knows of no others
    fresh = bool((layer.running_mean == 0).all() and (layer.running_var == 1).all())
    return count if count or fresh else math.inf
