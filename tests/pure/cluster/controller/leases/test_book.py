"""The lease book against examples by hand, and against a simple oracle under random events."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from downpour.cluster.controller.leases.book import LeaseBook
from downpour.shuffler.errors import LeaseError, PlanError
from downpour.shuffler.plan.plan import Plan
from tests.helpers.plans import RememberedPlan

PLAN = RememberedPlan(
    num_rows=43, batch_size=4, seed=5, window_batches=4
)  # 11 batches: windows of 4, 4, 3
Q = PLAN.num_batches


def handled(*batches: int) -> np.ndarray:
    mask = np.zeros(Q, dtype=bool)
    mask[list(batches)] = True
    return mask


def drain(book: LeaseBook) -> list[tuple[int, int]]:
    """Grant and complete until nothing waits; the (epoch, batch) pairs in order."""
    ran = []
    while (lease := book.grant(0)) is not None:
        ran += [(lease.epoch, batch) for batch in lease.batches]
        assert book.complete(lease.id, 0)
        book.check()
    return ran


@pytest.fixture
def book():
    book = LeaseBook(PLAN, epochs=2)
    yield book
    book.check()


def test_every_batch_once_in_the_plans_order(book):
    expected = [
        (epoch, int(batch))
        for epoch in range(2)
        for window in PLAN.window_order(epoch)
        for batch in PLAN.window_batches_order(epoch, int(window))
    ]
    assert drain(book) == expected
    assert book.finished
    assert book.progress == 1.0
    assert book.epochs_finished == 2


def test_there_is_no_barrier_between_epochs(book):
    leases = [book.grant(holder) for holder in range(4)]
    assert [lease.epoch for lease in leases] == [0, 0, 0, 1]
    assert book.complete(leases[3].id, 3)
    assert book.epochs_finished == 0
    assert [lease.id for lease in book.outstanding] == [0, 1, 2]


def test_nothing_waits_is_not_finished(book):
    leases = [book.grant(7) for _ in range(6)]
    assert book.grant(8) is None
    assert not book.finished
    book.give_back(leases[1].id)
    again = book.grant(8)
    assert again.batches == leases[1].batches
    assert again.id != leases[1].id


def test_lost_leases_come_back_without_what_the_partitions_hold(book):
    lease, other = book.grant(1), book.grant(2)
    assert book.lost(1) == [lease]
    assert book.lost(1) == []
    assert book.leases_of(1) == ()
    assert book.leases_of(2) == (other,)
    assert book.reconcile(lease.id, handled(*lease.batches[:2])) == 2
    again = book.grant(2)
    assert again.batches == lease.batches[2:]
    assert book.remaining_batches == 2 * Q - 2


def test_a_unit_is_done_only_as_a_whole():
    book = LeaseBook(PLAN, epochs=1, unit=2)
    lease = book.grant(1)
    first = lease.batches
    book.lost(1)
    assert book.reconcile(lease.id, handled(*first[:3])) == len(first) - 2
    assert book.grant(1).batches == first[2:]
    book.check()


def test_a_unit_handled_in_part_is_leased_whole_on_resume():
    window = int(PLAN.window_order(0)[0])
    order = PLAN.window_batches_order(0, window).tolist()
    book = LeaseBook(PLAN, epochs=1, unit=2, done={0: handled(*order[:3])})
    assert book.remaining_batches == Q - 2
    assert book.grant(0).batches == tuple(order[2:])
    book.check()


def test_a_late_completion_is_no_completion(book):
    lease = book.grant(1)
    book.lost(1)
    assert not book.complete(lease.id, 1)
    book.reconcile(lease.id, handled())
    assert not book.complete(lease.id, 1)
    again = book.grant(2)
    assert not book.complete(again.id, 1)
    assert book.complete(again.id, 2)
    assert not book.complete(again.id, 2)


def test_resume_at_every_step_runs_each_batch_once():
    whole = drain(LeaseBook(PLAN, epochs=3))
    for steps in range(len(whole) + 1):
        before = whole[:steps]
        done = {e: handled(*(b for f, b in before if f == e)) for e in range(3)}
        book = LeaseBook(PLAN, epochs=3, done=done)
        book.check()
        assert book.remaining_batches == len(whole) - steps
        assert before + drain(book) == whole


def test_resume_after_whole_epochs():
    book = LeaseBook(PLAN, epochs=3, first_epoch=2)
    assert book.epochs_finished == 2
    assert {epoch for epoch, _ in drain(book)} == {2}
    assert LeaseBook(PLAN, epochs=3, first_epoch=3).finished


def test_reopen_returns_what_a_restored_partition_lost(book):
    first = book.grant(1)
    book.complete(first.id, 1)
    assert book.reopen(0, handled(*first.batches[1:])) == 1
    assert book.grant(1).batches == first.batches[:1]


def test_reopen_a_complete_epoch(book):
    drain(book)
    assert book.reopen(0, handled(*range(1, Q))) == 1
    assert not book.finished
    assert book.epochs_finished == 0
    assert drain(book) == [(0, 0)]
    assert book.finished


def test_reopen_an_epoch_that_has_not_begun():
    book = LeaseBook(PLAN, epochs=2, done={1: np.ones(Q, dtype=bool)})
    assert book.reopen(1, handled(*range(2, Q))) == 2
    book.check()
    assert [pair for pair in drain(book) if pair[0] == 1] in ([(1, 0), (1, 1)], [(1, 1), (1, 0)])
    assert book.finished


def test_only_open_epochs_take_memory():
    plan = Plan(num_rows=10**6, batch_size=32)
    book = LeaseBook(plan, epochs=1000)
    assert book.total_batches == 1000 * plan.num_batches
    book.grant(0)
    assert len(book._coverage.open_epochs) == 1


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: LeaseBook(PLAN, epochs=1, unit=0), "unit=0"),
        (lambda: LeaseBook(PLAN, epochs=1, first_epoch=2), "first_epoch=2"),
        (lambda: LeaseBook(PLAN, epochs=1, done={1: handled()}), "epoch 1 is not in"),
        (lambda: LeaseBook(PLAN, epochs=1, done={0: np.zeros(3, bool)}), r"not bool \[11\]"),
        (lambda: LeaseBook(PLAN, epochs=1).complete(0, 0), "lease 0 was never granted"),
        (lambda: LeaseBook(PLAN, epochs=1).give_back(3), "lease 3 was never granted"),
    ],
)
def test_errors_name_the_value(action, message):
    with pytest.raises(LeaseError, match=message) as error:
        action()
    assert "\n" not in str(error.value)


def test_the_plans_bound_is_checked_up_front():
    with pytest.raises(PlanError, match="passes the bound of 11 epochs"):
        LeaseBook(dataclasses.replace(PLAN, past_bound="error"), epochs=12)


def test_a_lease_is_reconciled_once(book):
    lease = book.grant(0)
    book.give_back(lease.id)
    with pytest.raises(LeaseError, match="not outstanding"):
        book.give_back(lease.id)


class Books(RuleBasedStateMachine):
    """Replicas that apply, complete, die and return, against sets of (epoch, batch) pairs.

    `applied` is what the partitions hold. The oracle's rule is that each unit is lent to one
    holder at a time, that a unit that is done is not lent, and that at the end all is applied.
    """

    @initialize(unit=st.integers(1, 5), window=st.integers(1, 12), rows=st.integers(4, 60))
    def start(self, unit, window, rows):
        self.plan = Plan(
            num_rows=rows, batch_size=3, seed=rows, window_batches=window, past_bound="rekey"
        )
        self.unit = unit
        self.applied: set[tuple[int, int]] = set()
        self.done: set[tuple[int, int]] = set()
        self.out: dict[int, tuple[int, list]] = {}
        self.lost: dict[int, list] = {}
        self.book = LeaseBook(self.plan, epochs=3, unit=unit)

    def mask(self, epoch):
        return np.array([(epoch, b) in self.applied for b in range(self.plan.num_batches)])

    def units(self, pairs):
        whole = set(pairs)
        for epoch, window in {(e, b // self.plan.window_batches) for e, b in pairs}:
            order = self.plan.window_batches_order(epoch, window).tolist()
            for start in range(0, len(order), self.unit):
                unit = [(epoch, b) for b in order[start : start + self.unit]]
                if unit[0] in whole:
                    assert set(unit) <= whole, "a unit was split"
                    yield unit

    @rule(holder=st.integers(0, 3))
    def grant(self, holder):
        lease = self.book.grant(holder)
        held = [pair for _, pairs in self.out.values() for pair in pairs]
        held += [pair for pairs in self.lost.values() for pair in pairs]
        waiting = 3 * self.plan.num_batches - len(held) - len(self.done)
        if lease is None:
            assert waiting == 0
            return
        pairs = [(lease.epoch, batch) for batch in lease.batches]
        list(self.units(pairs))
        assert not set(pairs) & (set(held) | self.done)
        self.out[lease.id] = (holder, pairs)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def push_some(self, data):
        lease_id = data.draw(st.sampled_from(sorted(self.out)))
        units = list(self.units(self.out[lease_id][1]))
        for unit in units[: data.draw(st.integers(0, len(units)))]:
            self.applied |= set(unit)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def complete(self, data):
        lease_id = data.draw(st.sampled_from(sorted(self.out)))
        holder, pairs = self.out.pop(lease_id)
        self.applied |= set(pairs)
        self.done |= set(pairs)
        assert not self.book.complete(lease_id, holder + 1)
        assert self.book.complete(lease_id, holder)

    @rule(holder=st.integers(0, 3))
    def lose(self, holder):
        leases = self.book.lost(holder)
        expected = {i for i, (h, _) in self.out.items() if h == holder}
        assert {lease.id for lease in leases} == expected
        for lease_id in expected:
            self.lost[lease_id] = self.out.pop(lease_id)[1]

    @precondition(lambda self: self.lost)
    @rule(data=st.data())
    def reconcile(self, data):
        lease_id = data.draw(st.sampled_from(sorted(self.lost)))
        pairs = self.lost.pop(lease_id)
        back = self.book.reconcile(lease_id, self.mask(pairs[0][0]))
        assert back == len(set(pairs) - self.applied)
        self.done |= set(pairs) & self.applied

    @rule(epoch=st.integers(0, 2), data=st.data())
    def restore_a_partition(self, epoch, data):
        """Some applied units of an epoch are lost with the partition that held them."""
        units = list(self.units([p for p in self.done if p[0] == epoch]))
        lost = data.draw(st.lists(st.sampled_from(units), unique_by=tuple)) if units else []
        for unit in lost:
            self.applied -= set(unit)
            self.done -= set(unit)
        assert self.book.reopen(epoch, self.mask(epoch)) == sum(map(len, lost))

    @rule()
    def restart_the_controller(self):
        done = {epoch: self.mask(epoch) for epoch in range(3)}
        self.book = LeaseBook(self.plan, epochs=3, unit=self.unit, done=done)
        self.out, self.lost = {}, {}
        self.done = set(self.applied)

    @invariant()
    def agrees(self):
        if not hasattr(self, "book"):
            return
        self.book.check()
        total = 3 * self.plan.num_batches
        assert self.book.remaining_batches == total - len(self.done)
        assert self.book.finished == (len(self.done) == total)
        assert {lease.id for lease in self.book.outstanding} == {*self.out, *self.lost}
        for epoch in range(3):
            assert {(epoch, int(b)) for b in np.flatnonzero(self.book.done(epoch))} == {
                pair for pair in self.done if pair[0] == epoch
            }

    def teardown(self):
        if not hasattr(self, "book"):
            return
        for holder in range(4):
            self.book.lost(holder)
        for lease in self.book.outstanding:
            self.book.reconcile(lease.id, self.mask(lease.epoch))
        ran = drain(self.book)
        assert len(ran) == len(set(ran))
        assert self.book.finished


Books.TestCase.settings = settings(stateful_step_count=25, derandomize=True, database=None)
TestBooks = Books.TestCase
