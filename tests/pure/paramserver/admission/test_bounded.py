"""Bounded staleness: a scripted order of arrivals, and random ones that have to end."""

import random

import pytest

from downpour.paramserver.admission.bounded import BoundedPermits
from downpour.paramserver.admission.permits import DuePush, Key, Permit
from downpour.paramserver.errors import MalformedMessage

A, B, C = (7, 0), (7, 1), (8, 0)


def test_a_scripted_order_of_arrivals() -> None:
    admission = BoundedPermits[str](bound=2)
    for key in (A, B, C):
        admission.ask(key)
    assert [admission.next(0) for _ in range(4)] == [Permit(A), Permit(B), Permit(C), None]
    # B and C may pass A once each; a second time would leave A beyond the bound.
    admission.push(C, 0, "c")
    assert admission.next(0) == DuePush(C, "c")
    admission.push(B, 0, "b")
    assert admission.next(1) == DuePush(B, "b")
    admission.ask(B)
    admission.ask(C)
    assert [admission.next(2) for _ in range(3)] == [Permit(B), Permit(C), None]
    admission.push(C, 2, "c2")
    admission.push(B, 2, "b2")
    assert admission.next(2) is None
    assert (admission.num_out, admission.num_held) == (3, 2)
    # A comes, and is applied with a staleness of 2, before those that were there before it.
    admission.push(A, 0, "a")
    turns = [admission.next(version) for version in (2, 3, 4, 5)]
    assert {turns[1], turns[2]} == {DuePush(B, "b2"), DuePush(C, "c2")}
    assert (turns[0], turns[3]) == (DuePush(A, "a"), None)


def test_no_more_steps_than_the_bound_has_room_for() -> None:
    admission = BoundedPermits[str](bound=0)
    admission.ask(A)
    admission.ask(B)
    assert [admission.next(5), admission.next(5)] == [Permit(A), None]
    admission.push(A, 5, "a")
    assert [admission.next(5), admission.next(6)] == [DuePush(A, "a"), Permit(B)]


def test_who_is_gone_holds_nobody_up() -> None:
    admission = BoundedPermits[str](bound=1)
    for key in (A, C):
        admission.ask(key)
        assert admission.next(0) == Permit(key)
    admission.push(C, 0, "c")
    assert admission.next(0) == DuePush(C, "c")
    admission.ask(C)
    assert admission.next(1) == Permit(C)
    admission.push(C, 1, "c")
    assert admission.next(1) is None  # A has to come first
    admission.ask(B)
    admission.leave(A[0])
    assert [admission.next(1), admission.next(2)] == [DuePush(C, "c"), None]
    assert admission.num_out == 0


def test_what_no_honest_client_sends() -> None:
    admission = BoundedPermits[str](bound=1)
    with pytest.raises(MalformedMessage, match="without a permit"):
        admission.push(A, 0, "a")
    admission.ask(A)
    with pytest.raises(MalformedMessage, match="second permit"):
        admission.ask(A)
    assert admission.next(3) == Permit(A)
    with pytest.raises(MalformedMessage, match="second permit"):
        admission.ask(A)
    with pytest.raises(MalformedMessage, match="version 2, permitted at 3"):
        admission.push(A, 2, "a")
    admission.push(A, 3, "a")
    with pytest.raises(MalformedMessage, match="without a permit"):
        admission.push(A, 3, "a")


class Simulation:
    """Slots and partitions whose messages arrive in a random order, each channel's own kept."""

    def __init__(self, *, slots: int, partitions: int, bound: int, steps: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.bound, self.left = bound, steps
        self.partitions = [BoundedPermits[int](bound) for _ in range(partitions)]
        self.versions = [0] * partitions
        self.applied: list[list[int]] = [[] for _ in range(partitions)]
        self.largest = 0
        self.slots = [(slot % 3, slot) for slot in range(slots)]
        self.state: dict[Key, int | None] = dict.fromkeys(self.slots)
        """How many partitions have given their permit; None for an idle slot."""
        self.pulled: dict[Key, list[int]] = {}
        self.batches: dict[Key, int] = {}
        self.unanswered: dict[Key, int] = {}
        self.mail: list[tuple[int, Key, int]] = []
        """Pushes on their way: partition, slot, mini-batch."""

    def moves(self) -> list[tuple[str, Key, int]]:
        found: list[tuple[str, Key, int]] = []
        for key in self.slots:
            permits = self.state[key]
            if permits is None:
                if self.left and not self.unanswered.get(key):
                    found.append(("begin", key, 0))
            elif permits == len(self.partitions):
                found.append(("push" if key in self.pulled else "pull", key, 0))
        return found + [("arrive", key, i) for i, (_, key, _) in enumerate(self.mail)]

    def run(self) -> None:
        while moves := self.moves():
            name, key, at = self.random.choice(moves)
            if name == "begin":
                self.left -= 1
                self.batches[key] = self.left
                self.state[key] = 0
                self.partitions[0].ask(key)
                self.settle(0)
            elif name == "pull":
                self.pulled[key] = list(self.versions)
            elif name == "push":
                self.state[key] = None
                self.unanswered[key] = len(self.partitions)
                self.mail += [(p, key, self.batches[key]) for p in range(len(self.partitions))]
            else:
                partition, key, batch = self.mail.pop(at)
                self.partitions[partition].push(key, self.pulled[key][partition], batch)
                self.settle(partition)

    def settle(self, partition: int) -> None:
        while (due := self.partitions[partition].next(self.versions[partition])) is not None:
            if isinstance(due, Permit):
                permits = self.state[due.key]
                assert permits == partition
                self.state[due.key] = permits + 1
                if permits + 1 < len(self.partitions):
                    self.partitions[permits + 1].ask(due.key)
                    self.settle(permits + 1)
                continue
            staleness = self.versions[partition] - self.pulled[due.key][partition]
            assert 0 <= staleness <= self.bound
            self.largest = max(self.largest, staleness)
            self.applied[partition].append(due.push)
            self.versions[partition] += 1
            self.unanswered[due.key] -= 1
            if not self.unanswered[due.key]:
                del self.pulled[due.key]


@pytest.mark.parametrize("partitions", [1, 2, 4])
@pytest.mark.parametrize("bound", [0, 1, 3, 8])
def test_random_schedules_keep_to_the_bound_and_end(partitions: int, bound: int) -> None:
    reached = 0
    for seed in range(12):
        run = Simulation(slots=6, partitions=partitions, bound=bound, steps=60, seed=seed)
        run.run()  # until nobody can go on
        assert all(sorted(found) == list(range(60)) for found in run.applied)
        assert all(p.num_out == p.num_held == 0 for p in run.partitions)
        reached = max(reached, run.largest)
    assert reached == bound  # it waits no longer than it must
