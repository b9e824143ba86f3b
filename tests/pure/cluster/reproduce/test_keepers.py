"""BN statistics as replicas would keep them, by hand."""

import torch

from downpour.cluster.reproduce.keepers import Keepers
from downpour.paramserver.rules.statistics import StatisticsRule


def _moments(mean: float, variance: float, count: float = 4.0) -> torch.Tensor:
    return torch.tensor([[[count], [mean], [variance]]])


def test_each_replica_keeps_its_own_and_the_average_is_of_those_that_pushed() -> None:
    keepers = Keepers(num_replicas=3, num_features=1, rule=StatisticsRule(decay=0.75))
    assert keepers.replicas == ()
    keepers.take(0, _moments(2.0, 4.0))
    keepers.take(2, _moments(6.0, 8.0))
    assert keepers.replicas == (0, 2)
    assert keepers.of(0).tolist() == [[2.0], [4.0]]
    assert keepers.of(1).tolist() == [[0.0], [1.0]]
    assert keepers.averaged().tolist() == [[4.0], [6.0]]
    for _ in range(4):  # weights 1/2, 1/3, 1/4, and from then on 1 - 0.75
        keepers.take(0, _moments(6.0, 4.0))
    # By hand: the plain mean of 2, 6, 6, 6 is 5, then a quarter of the way from 5 to 6.
    assert torch.allclose(keepers.of(0), torch.tensor([[5.25], [4.0]]))
    assert keepers.of(2).tolist() == [[6.0], [8.0]]


def test_several_mini_batches_of_a_push_and_features_without_a_variance() -> None:
    keepers = Keepers(num_replicas=1, num_features=1, rule=StatisticsRule())
    keepers.take(0, torch.cat([_moments(1.0, 2.0), _moments(3.0, 4.0)]))
    assert keepers.of(0).tolist() == [[2.0], [3.0]]
    keepers.take(0, _moments(100.0, 0.0, count=1.0))
    assert keepers.of(0).tolist() == [[2.0], [3.0]]
