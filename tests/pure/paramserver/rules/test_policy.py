"""Staleness policies as pure functions, and what the state does with them."""

import pytest
import torch

from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.messages import Outcome, Push
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Version
from downpour.paramserver.rules.policy import StalenessPolicy
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.update import SGD


def state(policy: StalenessPolicy) -> PartitionState:
    (partition,) = split(num_parameters=16, num_features=0, num_decayed=0, num_partitions=1)
    config = UpdateConfig(
        rule=SGD(),
        schedule=Schedule(learning_rate=1.0),
        policy=policy,
        batches_per_epoch=100,
        epoch_examples=100,
    )
    return PartitionState(
        partition, config, Version(weights=torch.zeros(16), statistics=torch.zeros(2, 0))
    )


def push(to: PartitionState, batch: int, version: int) -> Outcome:
    return to.apply(
        Push(
            mailbox=0,
            replica=0,
            epoch=0,
            batches=(batch,),
            examples=1,
            version=version,
            loss=1.0,
            gradient_norm=4.0,
        ),
        torch.ones(16),
        torch.zeros(1, 3, 0),
    )


def test_asynchronous_applies_whatever_comes() -> None:
    policy = StalenessPolicy()
    for staleness in (0, 1, 49, 10**6):
        decision = policy.decide(staleness, 3.0)
        assert (decision.scale, decision.dropped) == (1.0, False)


def test_drop_keeps_to_its_bound_exactly() -> None:
    policy = StalenessPolicy(staleness_policy="drop", staleness_bound=7)
    assert [policy.decide(s, 49.0).dropped for s in (0, 7, 8, 100)] == [False, False, True, True]
    assert "beyond 7" in policy.decide(8, 0.0).reason


def test_scale_is_relative_to_the_mean() -> None:
    policy = StalenessPolicy(staleness_policy="scale")
    assert policy.decide(49, 49.0).scale == 1.0
    assert policy.decide(0, 49.0).scale == 1.0
    assert policy.decide(99, 49.0).scale == 0.5
    assert policy.decide(199, 49.0).scale == 0.25
    assert not policy.decide(10**9, 0.0).dropped


def test_a_dropped_push_changes_nothing_and_may_come_again() -> None:
    server = state(StalenessPolicy(staleness_policy="drop", staleness_bound=1))
    outcomes = [push(server, batch, 0) for batch in (0, 1, 2)]
    assert outcomes == [Outcome.APPLIED, Outcome.APPLIED, Outcome.REFUSED_STALE]
    assert server.version == 2
    assert torch.equal(server.current.weights, torch.full((16,), -2.0))
    assert server.ledger.counts()["dropped"] == 1
    assert not Outcome.REFUSED_STALE.settled
    assert push(server, 2, 1) is Outcome.APPLIED
    assert push(server, 2, 2) is Outcome.DUPLICATE
    assert server.ledger.staleness.all().counts.tolist() == [1, 2]
    server.check()


def test_a_scaled_push_takes_its_share_of_the_rate() -> None:
    server = state(StalenessPolicy(staleness_policy="scale"))
    push(server, 0, 0)
    assert server.ledger.mean_staleness == 0.0
    push(server, 1, 0)  # staleness 1 where 0 is usual: half the rate
    assert torch.equal(server.current.weights, torch.full((16,), -1.5))
    assert server.ledger.mean_staleness == pytest.approx(0.01)
    meta, tensors = server.dump()
    again = state(StalenessPolicy(staleness_policy="scale"))
    again.load(meta, tensors)
    assert again.ledger.mean_staleness == server.ledger.mean_staleness


def test_a_bound_below_nothing_is_refused() -> None:
    with pytest.raises(BadConfiguration, match="staleness bound is -1: give 0 or more"):
        StalenessPolicy(staleness_bound=-1)
