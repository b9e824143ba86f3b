"""What the records of a run say together: branches, parents, and who took which gradient."""

import pytest

from downpour.cluster.replay.history import History, VersionId
from downpour.paramserver.errors import BadRecord
from downpour.paramserver.messages import Outcome
from downpour.paramserver.partition.record import Branch, Entry


def entry(batch: int, version: int, outcome: Outcome = Outcome.APPLIED, print_: int = 0) -> Entry:
    return Entry(
        epoch=0, batch=batch, replica=0, outcome=outcome, version=version, fingerprint=print_
    )


def branch(
    partition: int, number: int, version: int, *entries: Entry, counts: bool = True
) -> Branch:
    return Branch(
        partition=partition, number=number, version=version, entries=entries, counts=counts
    )


def test_a_gradient_is_needed_by_each_partition_that_applies_it() -> None:
    history = History([branch(p, 0, 0, entry(0, 0), entry(1, 0), entry(2, 1)) for p in (0, 1)], 2)
    assert history.num_entries == 6
    assert all(history.complete(c) and c.left == 2 for c in history.computations.values())
    assert history.computations[0, 2, 0].bases == {p: VersionId(p, 0, 1) for p in (0, 1)}
    assert history.needed() == {VersionId(p, 0, v): 2 - v for p in (0, 1) for v in (0, 1)}
    assert history.search_window() == 0


def test_what_was_refused_or_repeated_needs_no_weights() -> None:
    outcomes = (Outcome.REFUSED_LOSS, Outcome.DUPLICATE)
    history = History([branch(0, 0, 0, *(entry(i, 0, o) for i, o in enumerate(outcomes)))], 1)
    assert history.needed() == {}
    assert [c.left for c in history.computations.values()] == [0, 0]


def test_two_computations_of_a_mini_batch_are_told_by_their_fingerprints() -> None:
    history = History(
        [branch(0, 0, 0, entry(0, 0, print_=7)), branch(0, 1, 0, entry(0, 0, print_=8))], 1
    )
    assert sorted(history.computations) == [(0, 0, 7), (0, 0, 8)]


def test_a_restart_begins_from_the_newest_branch_that_is_not_ahead() -> None:
    first = branch(0, 0, 0, *(entry(i, i) for i in range(5)))
    second = branch(0, 1, 3, *(entry(10 + i, 3 + i) for i in range(4)))
    third = branch(0, 2, 2, entry(20, 2))
    history = History([third, first, second], 1)
    assert history.children(VersionId(0, 0, 3)) == [second]
    assert history.children(VersionId(0, 0, 2)) == [third]
    assert history.children(VersionId(0, 1, 5)) == []
    # The newest branch is the third: it has what the first did up to version 2, and nothing else.
    lasting = [(n, v) for n in (0, 1, 2) for v in range(1, 8) if history.lasts(VersionId(0, n, v))]
    assert lasting == [(0, 1), (0, 2), *((2, v) for v in range(1, 8))]


def test_pushes_from_before_a_branch_began_are_on_its_parent() -> None:
    first = branch(0, 0, 0, *(entry(i, i) for i in range(3)))
    promoted = branch(0, 1, 3, entry(3, 1), entry(4, 3))
    history = History([first, promoted], 1)
    assert history.computations[0, 3, 0].bases == {0: VersionId(0, 0, 1)}
    assert history.computations[0, 4, 0].bases == {0: VersionId(0, 1, 3)}


def test_a_follower_that_never_became_the_partition_does_not_count() -> None:
    follower = branch(0, 1, 0, entry(0, 0), counts=False)
    history = History([branch(0, 0, 0, entry(0, 0)), follower], 1)
    assert list(history.branches) == [(0, 0)]
    assert history.computations[0, 0, 0].left == 1


def test_a_push_that_one_partition_never_got_has_to_be_searched() -> None:
    stale = [entry(i, 0) for i in range(4)]
    history = History([branch(0, 0, 0, *stale), branch(1, 0, 0, *stale[:3])], 2)
    assert not history.complete(history.computations[0, 3, 0])
    assert history.search_window() == 2 * 3 + 64


@pytest.mark.parametrize(
    "branches",
    [
        [branch(0, 0, 0)],  # of two partitions
        [branch(0, 0, 0), branch(1, 0, 3)],
        [branch(0, 0, 0), branch(1, 1, 0)],
    ],
)
def test_a_partition_without_a_beginning_is_refused(branches: list[Branch]) -> None:
    with pytest.raises(BadRecord, match="has no beginning"):
        History(branches, 2)
