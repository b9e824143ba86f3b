"""Which windows are out: examples by hand, and random losses that end with everything settled."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from downpour.cluster.controller.coverage import Flags
from downpour.cluster.controller.lease_book import Lease
from downpour.cluster.controller.lease_manager import Census, Lending
from downpour.cluster.controller.warm_start import WINDOWS
from downpour.cluster.monitoring.observation import Leases
from downpour.paramserver.partition.applied_set import APPLIED, WAITING
from downpour.shuffler.plan.plan import Plan
from downpour.workers.config import ReplicaConfig
from downpour.workers.replica.replicas import WindowReport

# 11 mini-batches, 3 windows.
PLAN = Plan(num_rows=43, batch_size=4, seed=5, window_batches=4, past_bound="rekey")
Q, EPOCHS = PLAN.num_batches, 2


def lending(epochs: int = EPOCHS, **about: object) -> Lending:
    config = dataclasses.replace(ReplicaConfig(replicas=3), **about)  # type: ignore[arg-type]
    return Lending(PLAN, epochs=epochs, replicas=config)


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
    """What one has settled, by epoch."""

    def __init__(self) -> None:
        self.flags = {e: np.full(Q, WAITING, np.uint8) for e in range(EPOCHS)}

    def settle(self, epoch: int, *batches: int) -> None:
        self.flags[epoch][list(batches)] = APPLIED

    def saved(self) -> Flags:
        return {e: flags.copy() for e, flags in self.flags.items()}


def test_each_replica_has_its_queue_filled_and_no_more() -> None:
    book = lending(queued_windows=2)
    assert [replica for replica, _ in book.lend([0, 1])] == [0, 0, 1, 1]
    assert list(book.lend([0, 1])) == []
    assert book.leases == Leases(outstanding=4, queued=2, returned=0)
    assert (book.num_held_by(0), book.num_held_by(0, 1), book.num_held_by(2)) == (2, 4, 0)


def test_a_window_that_was_not_delivered_is_lent_again() -> None:
    book = lending(queued_windows=1)
    ((_, lease),) = book.lend([0])
    book.undelivered(0, lease)
    assert not book.is_live(lease)
    ((replica, again),) = book.lend([1])
    assert (replica, again.batches, again.id == lease.id) == (1, lease.batches, False)
    assert book.leases == Leases(outstanding=1, queued=0, returned=1)


def test_what_a_lost_replica_had_is_in_doubt_until_the_partitions_say() -> None:
    book = lending(epochs=1, queued_windows=3)
    leases = [lease for _, lease in book.lend([0])]
    assert book.census() is None
    book.lost([0])
    assert not any(map(book.is_live, leases))
    assert book.num_held_by(0) == 0
    assert list(book.lend([1])) == []  # nothing waits: all is in doubt
    census = book.census()
    assert census is not None
    assert (census.epochs, set(census.doubt)) == ((0,), {lease.id for lease in leases})
    assert book.census() is None  # one at a time
    book.census_lost()
    assert book.census() == census
    one, other = Partition(), Partition()
    one.settle(0, *leases[0].batches, *leases[1].batches)
    other.settle(0, *leases[0].batches, *leases[2].batches)
    assert book.settle(census, [one.flags, other.flags]) is None
    again = sorted(batch for _, lease in book.lend([1]) for batch in lease.batches)
    assert again == sorted(leases[1].batches + leases[2].batches)
    assert book.census() is None


def test_of_a_window_that_not_every_partition_took_the_rest_is_lent_again() -> None:
    book = lending(epochs=1, queued_windows=1)
    ((_, lease),) = book.lend([0])
    book.trained(0, lease, report(lease, 1.0, lease.batches[2]))
    census = book.census()
    assert census is not None
    partition = Partition()
    partition.settle(0, *(b for b in lease.batches if b != lease.batches[2]))
    book.settle(census, [partition.flags])
    # The rest of that window comes before the next one.
    ((_, again),) = book.lend([0])
    assert again.batches == (lease.batches[2],)


def test_a_partition_that_goes_back_in_time_has_done_windows_lent_again() -> None:
    book = lending(queued_windows=1)
    partition, saved = Partition(), Partition().saved()
    for _ in range(4):
        ((_, lease),) = book.lend([0])
        partition.settle(lease.epoch, *lease.batches)
        book.trained(0, lease, report(lease))
    assert partition.flags[1].any()  # of two epochs
    book.lost([0])
    book.partition_lost(promoted=False)
    census = book.census()
    assert census is not None
    assert (census.epochs, census.reopening) == ((0, 1), True)
    done = sum(int((flags == APPLIED).sum()) for flags in partition.flags.values())
    assert book.settle(census, [partition.flags, saved]) == done
    assert not book.reopening
    seen = []
    for replica in range(2 * EPOCHS * 3):
        seen += [(le.epoch, b) for _, le in book.lend([replica]) for b in le.batches]
    assert sorted(seen) == [(e, b) for e in range(EPOCHS) for b in range(Q)]


def test_a_resumed_session_lends_what_some_partition_lacks() -> None:
    book = lending()
    one, other = Partition(), Partition()
    one.settle(0, *range(Q))
    other.settle(0, *range(3, Q))
    other.settle(1, 5)
    book.resume([one.flags, other.flags])
    ((_, lease), *_) = book.lend([0])
    assert set(lease.batches) <= {0, 1, 2}
    assert not book.finished


def test_losses_of_windows_lent_before_a_change_of_course_do_not_count() -> None:
    book = lending(epochs=40, queued_windows=1, warm_start_epochs=1, ramp_epochs=30, ramp_guard=1.5)

    def turn(loss: float | None) -> int:
        active = book.course(3).replicas
        for replica, lease in list(book.lend(range(active))):
            book.trained(replica, lease, report(lease, loss))
        return active

    while turn(1.0) < 2:
        pass
    for _ in range(WINDOWS):
        turn(1.0)
    late = list(book.lend([2]))
    while book.held is None:
        turn(None)  # most mini-batches were refused: no loss at all
    assert book.held == 1
    before = book.dump_ramp()
    for replica, lease in late:
        book.trained(replica, lease, report(lease, 0.1))
    assert book.dump_ramp() == before
    ((replica, lease),) = book.lend([0])
    book.trained(replica, lease, report(lease, 0.1))
    assert book.dump_ramp() != before


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_lost_in_the_end_every_partition_has_settled_everything(seed: int) -> None:
    """Replicas and partitions die at random, answers come late, and news of the dead too."""
    rng = random.Random(seed)
    book = lending(queued_windows=2)
    partitions = [Partition(), Partition()]
    saved = [p.saved() for p in partitions]
    out: list[tuple[int, Lease]] = []
    asked: tuple[Census, list[Flags]] | None = None
    turns = 0
    while not book.finished or book.reopening:
        turns += 1
        assert turns < 20_000
        if not book.reopening:
            out += book.lend(range(3))
        census = book.census()
        if census is not None:
            asked = census, [p.saved() for p in partitions]
        if asked is not None and rng.random() < 0.5:
            book.settle(*asked)  # as it was when they were asked
            asked = None
        if out and rng.random() < 0.7:
            replica, lease = out.pop(rng.randrange(len(out)))
            left = lease.batches[1:] if rng.random() < 0.2 else ()
            for partition in partitions:
                partition.settle(lease.epoch, *(b for b in lease.batches if b not in left))
            if book.is_live(lease):
                book.trained(replica, lease, report(lease, 1.0, *left))
        if rng.random() < 0.03:
            book.lost([rng.randrange(3)])
        index = rng.randrange(2)
        if rng.random() < 0.03:
            saved[index] = partitions[index].saved()
        if turns < 200 and rng.random() < 0.03:
            partitions[index].flags = {e: flags.copy() for e, flags in saved[index].items()}
            book.partition_lost(promoted=False)
            book.lost(range(3))
            book.census_lost()
            asked = None
    assert all((f == APPLIED).all() for p in partitions for f in p.flags.values())


def test_a_run_that_ends_early_lends_only_what_some_partition_lacks() -> None:
    book = lending(queued_windows=1)
    leases = [lease for _, lease in book.lend([0, 1, 2])]
    book.trained(0, leases[0], report(leases[0]))
    one, other = Partition(), Partition()
    for partition in (one, other):
        partition.settle(0, *leases[0].batches)
    one.settle(0, *leases[1].batches[:2])
    other.settle(0, *leases[1].batches[1:3])
    book.lost([0, 1, 2])
    book.end_early()
    assert list(book.lend([0, 1, 2])) == []
    assert book.census(quiet=False) is None  # somebody may still push
    census = book.census()
    assert census is not None
    assert (census.epochs, census.closing) == (tuple(range(EPOCHS)), True)
    assert not book.finished
    assert book.settle(census, [one.flags, other.flags]) == 2
    again = list(book.lend([0, 1, 2]))
    lacking = {leases[1].batches[0], leases[1].batches[2]}
    assert {b for _, lease in again for b in lease.batches} == lacking
    assert not book.finished
    for replica, lease in again:
        book.trained(replica, lease, report(lease))
    assert book.finished
    assert list(book.lend([0])) == []


def test_a_run_that_ends_early_with_nothing_lacking_is_finished_at_once() -> None:
    book = lending(queued_windows=1)
    ((_, lease),) = book.lend([0])
    partition = Partition()
    partition.settle(0, *lease.batches[:1])
    book.lost([0])
    book.end_early()
    census = book.census()
    assert census is not None
    assert book.settle(census, [partition.flags, partition.flags]) is None
    assert book.finished


def test_a_partition_lost_at_an_early_end_is_asked_again() -> None:
    book = lending(queued_windows=1)
    ((_, lease),) = book.lend([0])
    one, saved = Partition(), Partition().saved()
    one.settle(0, *lease.batches)
    book.lost([0])
    book.end_early()
    census = book.census()
    assert census is not None
    book.settle(census, [one.flags, one.flags])
    assert book.finished
    book.partition_lost(promoted=False)
    assert not book.finished
    census = book.census()
    assert census is not None
    assert book.settle(census, [one.flags, saved]) == len(lease.batches)
    ((_, again),) = book.lend([1])
    assert sorted(again.batches) == sorted(lease.batches)
