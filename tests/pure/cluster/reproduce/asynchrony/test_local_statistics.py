"""The BN statistics that each replica would keep by itself, by hand."""

import torch

from downpour.cluster.reproduce.asynchrony.local_statistics import LocalStatistics
from downpour.paramserver.rules.statistics import StatisticsRule


def _moments(mean: float, variance: float, count: float = 4.0) -> torch.Tensor:
    return torch.tensor([[[count], [mean], [variance]]])


def test_each_replica_keeps_its_own_and_the_average_is_of_those_that_pushed() -> None:
    local = LocalStatistics(num_replicas=3, num_features=1, rule=StatisticsRule(decay=0.75))
    assert local.replicas == ()
    local.take(0, _moments(2.0, 4.0))
    local.take(2, _moments(6.0, 8.0))
    assert local.replicas == (0, 2)
    assert local.of(0).tolist() == [[2.0], [4.0]]
    assert local.of(1).tolist() == [[0.0], [1.0]]
    assert local.averaged().tolist() == [[4.0], [6.0]]
    for _ in range(4):  # weights 1/2, 1/3, 1/4, and from then on 1 - 0.75
        local.take(0, _moments(6.0, 4.0))
    # By hand: the plain mean of 2, 6, 6, 6 is 5, then a quarter of the way from 5 to 6.
    assert torch.allclose(local.of(0), torch.tensor([[5.25], [4.0]]))
    assert local.of(2).tolist() == [[6.0], [8.0]]


def test_several_mini_batches_of_a_push_and_features_without_a_variance() -> None:
    local = LocalStatistics(num_replicas=1, num_features=1, rule=StatisticsRule())
    local.take(0, torch.cat([_moments(1.0, 2.0), _moments(3.0, 4.0)]))
    assert local.of(0).tolist() == [[2.0], [3.0]]
    local.take(0, _moments(100.0, 0.0, count=1.0))
    assert local.of(0).tolist() == [[2.0], [3.0]]
