"""Which windows are out: examples by hand, and random failures that end with everything covered."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from downpour.cluster.controller.leases.coverage import Flags
from downpour.cluster.controller.leases.manager import Census, Lease, LeaseManager, Leases
from downpour.cluster.controller.leases.warm_start import WINDOWS, WarmStart
from downpour.paramserver.partition.applied_set import APPLIED, WAITING
from downpour.shuffler.plan.plan import Plan
from downpour.workers.config import ReplicaConfig
from downpour.workers.replica.replicas import WindowReport
from tests.helpers.seeds import seeds

# 11 mini-batches, 3 windows.
PLAN = Plan(num_rows=43, batch_size=4, seed=5, window_batches=4, past_bound="rekey")
Q, EPOCHS = PLAN.num_batches, 2


def made(epochs: int = EPOCHS, **about: object) -> LeaseManager:
    config = dataclasses.replace(ReplicaConfig(replicas=3), **about)  # type: ignore[arg-type]
    return LeaseManager(
        PLAN,
        epochs=epochs,
        unit=1,
        queued_windows=config.queued_windows,
        warm_start=WarmStart(config),
    )


def report(lease: Lease, loss: float | None = 1.0, *unsettled: int) -> WindowReport:
    return WindowReport(
        replica=0,
        epoch=lease.epoch,
        num_batches=len(lease.batches),
        num_examples=4 * len(lease.batches),
        mean_loss=loss,
        refused=() if loss is not None else lease.batches,
        unsettled=unsettled,
        wall_s=1.0,
    )


class Partition:
    """What one covers, by epoch."""

    def __init__(self) -> None:
        self.flags = {e: np.full(Q, WAITING, np.uint8) for e in range(EPOCHS)}

    def settle(self, epoch: int, *batches: int) -> None:
        self.flags[epoch][list(batches)] = APPLIED

    def saved(self) -> Flags:
        return {e: flags.copy() for e, flags in self.flags.items()}


def test_each_replica_has_its_queue_filled_and_no_more() -> None:
    manager = made(queued_windows=2)
    assert [replica for replica, _ in manager.grant([0, 1])] == [0, 0, 1, 1]
    assert list(manager.grant([0, 1])) == []
    assert manager.leases == Leases(outstanding=4, queued=2, returned=0)
    assert (manager.num_held_by(0), manager.num_held_by(0, 1), manager.num_held_by(2)) == (2, 4, 0)


def test_a_window_that_was_not_delivered_is_leased_again() -> None:
    manager = made(queued_windows=1)
    ((_, lease),) = manager.grant([0])
    manager.undelivered(lease)
    assert not manager.is_live(lease)
    ((replica, again),) = manager.grant([1])
    assert (replica, again.batches, again.id == lease.id) == (1, lease.batches, False)
    assert manager.leases == Leases(outstanding=1, queued=0, returned=1)


def test_what_a_lost_replica_had_is_in_doubt_until_the_partitions_say() -> None:
    manager = made(epochs=1, queued_windows=3)
    leases = [lease for _, lease in manager.grant([0])]
    assert manager.census() is None
    manager.lost([0])
    assert not any(map(manager.is_live, leases))
    assert manager.num_held_by(0) == 0
    assert list(manager.grant([1])) == []  # nothing waits: all is in doubt
    census = manager.census()
    assert census is not None
    assert (census.epochs, {lease.id for lease in census.doubted}) == (
        (0,),
        {lease.id for lease in leases},
    )
    assert manager.census() == census  # until it is answered
    one, other = Partition(), Partition()
    one.settle(0, *leases[0].batches, *leases[1].batches)
    other.settle(0, *leases[0].batches, *leases[2].batches)
    assert manager.settle(census, [one.flags, other.flags]) is None
    again = sorted(batch for _, lease in manager.grant([1]) for batch in lease.batches)
    assert again == sorted(leases[1].batches + leases[2].batches)
    assert manager.census() is None


def test_of_a_window_that_not_every_partition_took_the_rest_is_leased_again() -> None:
    manager = made(epochs=1, queued_windows=1)
    ((_, lease),) = manager.grant([0])
    manager.trained(0, lease, report(lease, 1.0, lease.batches[2]))
    census = manager.census()
    assert census is not None
    partition = Partition()
    partition.settle(0, *(b for b in lease.batches if b != lease.batches[2]))
    manager.settle(census, [partition.flags])
    # The rest of that window comes before the next one.
    ((_, again),) = manager.grant([0])
    assert again.batches == (lease.batches[2],)


def test_a_partition_that_goes_back_in_time_has_done_windows_leased_again() -> None:
    manager = made(queued_windows=1)
    partition, saved = Partition(), Partition().saved()
    for _ in range(4):
        ((_, lease),) = manager.grant([0])
        partition.settle(lease.epoch, *lease.batches)
        manager.trained(0, lease, report(lease))
    assert partition.flags[1].any()  # of two epochs
    manager.lost([0])
    manager.partition_lost(promoted=False)
    census = manager.census()
    assert census is not None
    assert (census.epochs, census.reopening) == ((0, 1), True)
    done = sum(int((flags == APPLIED).sum()) for flags in partition.flags.values())
    assert manager.settle(census, [partition.flags, saved]) == done
    assert not manager.reopening
    seen = []
    for replica in range(2 * EPOCHS * 3):
        seen += [(le.epoch, b) for _, le in manager.grant([replica]) for b in le.batches]
    assert sorted(seen) == [(e, b) for e in range(EPOCHS) for b in range(Q)]


def test_a_resumed_session_leases_what_some_partition_lacks() -> None:
    manager = made()
    one, other = Partition(), Partition()
    one.settle(0, *range(Q))
    other.settle(0, *range(3, Q))
    other.settle(1, 5)
    manager.resume([one.flags, other.flags])
    ((_, lease), *_) = manager.grant([0])
    assert set(lease.batches) <= {0, 1, 2}
    assert not manager.finished


def test_losses_of_windows_leased_before_a_change_of_course_do_not_count() -> None:
    manager = made(epochs=40, queued_windows=1, warm_start_epochs=1, ramp_epochs=30, ramp_guard=1.5)

    def turn(loss: float | None) -> int:
        active = manager.decide_course(3).replicas
        for replica, lease in list(manager.grant(range(active))):
            manager.trained(replica, lease, report(lease, loss))
        return active

    while turn(1.0) < 2:
        pass
    for _ in range(WINDOWS):
        turn(1.0)
    late = list(manager.grant([2]))
    while manager.warm_start.held is None:
        turn(None)  # most mini-batches were refused: no loss at all
    assert manager.warm_start.held == 1
    before = manager.warm_start.dump()
    for replica, lease in late:
        manager.trained(replica, lease, report(lease, 0.1))
    assert manager.warm_start.dump() == before
    ((replica, lease),) = manager.grant([0])
    manager.trained(replica, lease, report(lease, 0.1))
    assert manager.warm_start.dump() != before


@pytest.mark.parametrize("seed", seeds(5, 40))
def test_whatever_is_lost_in_the_end_every_partition_covers_everything(seed: int) -> None:
    """Replicas and partitions die at random, answers come late, and news of the dead too."""
    rng = random.Random(seed)
    manager = made(queued_windows=2)
    partitions = [Partition(), Partition()]
    saved = [p.saved() for p in partitions]
    out: list[tuple[int, Lease]] = []
    asked: tuple[Census, list[Flags]] | None = None
    turns = 0
    while not manager.finished:
        turns += 1
        assert turns < 20_000
        if not manager.reopening:
            out += manager.grant(range(3))
        census = manager.census() if asked is None else None
        if census is not None:
            asked = census, [p.saved() for p in partitions]
        if asked is not None and rng.random() < 0.5:
            manager.settle(*asked)  # as it was when they were asked
            asked = None
        if out and rng.random() < 0.7:
            replica, lease = out.pop(rng.randrange(len(out)))
            left = lease.batches[1:] if rng.random() < 0.2 else ()
            for partition in partitions:
                partition.settle(lease.epoch, *(b for b in lease.batches if b not in left))
            if manager.is_live(lease):
                manager.trained(replica, lease, report(lease, 1.0, *left))
        if rng.random() < 0.03:
            manager.lost([rng.randrange(3)])
        manager.check()
        index = rng.randrange(2)
        if rng.random() < 0.03:
            saved[index] = partitions[index].saved()
        if turns < 200 and rng.random() < 0.03:
            partitions[index].flags = {e: flags.copy() for e, flags in saved[index].items()}
            manager.partition_lost(promoted=False)
            manager.lost(range(3))
            asked = None
    assert all((f == APPLIED).all() for p in partitions for f in p.flags.values())


def test_a_run_that_ends_early_leases_only_what_some_partition_lacks() -> None:
    manager = made(queued_windows=1)
    leases = [lease for _, lease in manager.grant([0, 1, 2])]
    manager.trained(0, leases[0], report(leases[0]))
    one, other = Partition(), Partition()
    for partition in (one, other):
        partition.settle(0, *leases[0].batches)
    one.settle(0, *leases[1].batches[:2])
    other.settle(0, *leases[1].batches[1:3])
    manager.lost([0, 1, 2])
    manager.end_early()
    assert list(manager.grant([0, 1, 2])) == []
    assert manager.census(quiet=False) is None  # somebody may still push
    census = manager.census()
    assert census is not None
    assert (census.epochs, census.closing) == (tuple(range(EPOCHS)), True)
    assert not manager.finished
    assert manager.settle(census, [one.flags, other.flags]) == 2
    again = list(manager.grant([0, 1, 2]))
    lacking = {leases[1].batches[0], leases[1].batches[2]}
    assert {b for _, lease in again for b in lease.batches} == lacking
    assert not any(manager.is_live(lease) for lease in leases)  # no id has been given twice
    assert not manager.finished
    for replica, lease in again:
        manager.trained(replica, lease, report(lease))
    assert manager.finished
    assert list(manager.grant([0])) == []


def test_a_run_that_ends_early_with_nothing_lacking_is_finished_at_once() -> None:
    manager = made(queued_windows=1)
    ((_, lease),) = manager.grant([0])
    partition = Partition()
    partition.settle(0, *lease.batches[:1])
    manager.lost([0])
    manager.end_early()
    census = manager.census()
    assert census is not None
    assert manager.settle(census, [partition.flags, partition.flags]) is None
    assert manager.finished


def test_a_partition_lost_at_an_early_end_is_asked_again() -> None:
    manager = made(queued_windows=1)
    ((_, lease),) = manager.grant([0])
    one, saved = Partition(), Partition().saved()
    one.settle(0, *lease.batches)
    manager.lost([0])
    manager.end_early()
    census = manager.census()
    assert census is not None
    manager.settle(census, [one.flags, one.flags])
    assert manager.finished
    manager.partition_lost(promoted=False)
    assert not manager.finished
    census = manager.census()
    assert census is not None
    assert manager.settle(census, [one.flags, saved]) == len(lease.batches)
    ((_, again),) = manager.grant([1])
    assert sorted(again.batches) == sorted(lease.batches)
