"""Poison is refused, whoever keeps sending it is quarantined, and the weights stay finite."""

import math

import pytest
import torch

from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Version
from downpour.paramserver.rules.policy import Guard

(PARTITION,) = split(num_parameters=32, num_features=0, num_decayed=0, num_partitions=1)


class Bench:
    """A state that takes pushes of one value, from any replica."""

    def __init__(self, guard: Guard) -> None:
        self.slots = [
            Version(weights=torch.zeros(32), statistics=torch.zeros(2, 0)) for _ in range(2)
        ]
        config = UpdateConfig(guard=guard, batches_per_epoch=10_000, epoch_examples=10_000)
        self.state = PartitionState(PARTITION, config, self.slots[0])
        self.batch = 0

    def push(self, value: float, *, replica: int = 0, norm: float | None = None) -> Outcome:
        gradient = torch.full((32,), value)
        push = Push(
            mailbox=0,
            replica=replica,
            epoch=0,
            batches=(self.batch,),
            examples=1,
            version=self.state.version,
            loss=1.0,
            gradient_norm=float(gradient.norm()) if norm is None else norm,
        )
        self.batch += 1
        into = self.slots[self.state.current is self.slots[0]]
        outcome = self.state.apply(push, gradient, torch.zeros(1, 3, 0), lambda: into)
        self.state.check()  # the weights are finite
        return outcome


@pytest.mark.parametrize(
    ("value", "norm"),
    [
        (math.nan, 1.0),  # the header is a lie in all of these but the last two
        (math.inf, 1.0),
        (-math.inf, 1.0),
        (1e30, 1.0),
        (1e30, 1e17),
        (3e7, 5.0),
        (1e30, None),
        (3e4, None),
        (1.0, -1.0),
        (1.0, math.nan),
    ],
)
def test_poison_changes_no_weight(value: float, norm: float | None) -> None:
    bench = Bench(Guard())
    for _ in range(100):
        assert bench.push(1.0) is Outcome.APPLIED
    before = bench.state.current.weights.clone()
    assert bench.push(value, norm=norm) is Outcome.REFUSED_GRADIENT
    assert torch.equal(bench.state.current.weights, before)
    assert bench.push(30.0) is Outcome.APPLIED  # long, and possible


def test_before_anything_is_usual_only_the_impossible_is_refused() -> None:
    bench = Bench(Guard())
    assert bench.push(1e3) is Outcome.APPLIED
    assert bench.push(1e20) is Outcome.REFUSED_GRADIENT


def test_a_replica_that_sends_poison_is_quarantined_and_nobody_else() -> None:
    bench = Bench(Guard(quarantine_after=3))
    for n in range(60):
        assert bench.push(1.0, replica=n % 4) is Outcome.APPLIED
    assert [bench.push(math.nan, replica=2) for _ in range(3)] == [Outcome.REFUSED_GRADIENT] * 3
    assert bench.state.ledger.quarantined == {2}
    settled = bench.state.ledger.applied.num_refused
    assert bench.push(1.0, replica=2) is Outcome.REFUSED_QUARANTINE
    assert bench.state.ledger.applied.num_refused == settled, "another is to compute it"
    assert bench.push(1.0, replica=1) is Outcome.APPLIED


def test_a_run_that_diverges_quarantines_nobody() -> None:
    bench = Bench(Guard(quarantine_after=3))
    for n in range(40):
        bench.push(1.0, replica=n % 4)
    for n in range(400):
        bench.push(math.nan, replica=n % 4)
    assert not bench.state.ledger.quarantined


def test_a_single_replica_is_not_quarantined() -> None:
    bench = Bench(Guard(quarantine_after=1))
    bench.push(1.0)
    bench.push(math.nan)
    assert not bench.state.ledger.quarantined


def test_bounds_that_make_no_sense() -> None:
    with pytest.raises(BadConfiguration, match=r"max norm ratio is 0\.5"):
        Guard(max_norm_ratio=0.5)
    with pytest.raises(BadConfiguration, match="quarantine after is 0"):
        Guard(quarantine_after=0)
