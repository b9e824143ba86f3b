"""The applied set against a plain dict, under random settling and restarts."""

import json

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from downpour.paramserver.partition.applied_set import APPLIED, REFUSED, WAITING, AppliedSet

Q, EPOCHS = 5, 3


def reloaded(applied: AppliedSet) -> AppliedSet:
    """By way of what a snapshot keeps: JSON, and the flags of open epochs."""
    meta, flags = applied.dump()
    return AppliedSet.load(json.loads(json.dumps(meta)), flags)


class Against(RuleBasedStateMachine):
    """Every mini-batch's outcome in a dict, and the set beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.applied = AppliedSet(Q)
        self.oracle: dict[tuple[int, int], int] = {}

    def waiting(self) -> list[tuple[int, int]]:
        every = [(e, b) for e in range(EPOCHS) for b in range(Q)]
        return [name for name in every if name not in self.oracle]

    @precondition(lambda self: self.waiting())
    @rule(data=st.data(), outcome=st.sampled_from([APPLIED, APPLIED, REFUSED]))
    def settle(self, data: st.DataObject, outcome: int) -> None:
        name = data.draw(st.sampled_from(self.waiting()))
        self.applied.add(*name, outcome)
        self.oracle[name] = outcome

    @precondition(lambda self: self.oracle)
    @rule(data=st.data())
    def settle_again(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.oracle)))
        with pytest.raises(AssertionError):
            self.applied.add(*name, APPLIED)

    @rule()
    def restart(self) -> None:
        self.applied = reloaded(self.applied)

    @invariant()
    def equals_the_oracle(self) -> None:
        applied, oracle = self.applied, self.oracle
        applied.check()
        for epoch in range(EPOCHS + 1):
            expected = [oracle.get((epoch, b), WAITING) for b in range(Q)]
            assert [applied.get(epoch, b) for b in range(Q)] == expected
            flags = applied.flags(epoch)
            assert flags.dtype == np.uint8
            assert flags.tolist() == expected
            done = Q - expected.count(WAITING)
            assert (epoch in applied.open_epochs) == (0 < done < Q)
            assert (epoch in applied.complete_epochs) == (done == Q)
        outcomes = list(oracle.values())
        assert applied.num_applied == outcomes.count(APPLIED)
        assert applied.num_refused == outcomes.count(REFUSED)

    @invariant()
    def a_dump_costs_nothing_for_a_complete_epoch_without_refusals(self) -> None:
        meta, flags = self.applied.dump()
        assert set(flags) == set(self.applied.open_epochs)
        complete = {
            str(e): [b for b in range(Q) if self.oracle[e, b] == REFUSED]
            for e in self.applied.complete_epochs
        }
        assert meta == {"num_batches": Q, "complete": complete}


Against.TestCase.settings = settings(stateful_step_count=25)
TestAgainstADict = Against.TestCase


def test_names_that_no_mini_batch_has() -> None:
    applied = AppliedSet(Q)
    assert applied.valid(0, (0, Q - 1))
    assert applied.valid(10**6, (0,))
    assert not applied.valid(-1, (0,))
    assert not applied.valid(0, (0, Q))
    assert not applied.valid(0, (-1,))


def test_flags_are_a_copy() -> None:
    applied = AppliedSet(Q)
    applied.add(0, 1, APPLIED)
    applied.flags(0)[:] = REFUSED
    assert applied.flags(0).tolist() == [WAITING, APPLIED, WAITING, WAITING, WAITING]


@pytest.mark.parametrize(
    ("meta", "flags"),
    [
        ({"num_batches": Q, "complete": {}}, {0: [0, 1, 7, 0, 0]}),
        ({"num_batches": Q, "complete": {}}, {0: [0, 1]}),
        ({"num_batches": Q, "complete": {}}, {0: [1] * Q}),
        ({"num_batches": Q, "complete": {}}, {0: [0] * Q}),
        ({"num_batches": Q, "complete": {"0": [Q]}}, {}),
        ({"num_batches": Q, "complete": {"0": [1, 1]}}, {}),
        ({"num_batches": Q, "complete": {"0": []}}, {0: [1, 0, 0, 0, 0]}),
    ],
)
def test_what_cannot_be_is_not_loaded(meta: dict[str, object], flags: dict[int, list[int]]) -> None:
    arrays = {epoch: np.array(f, np.uint8) for epoch, f in flags.items()}
    with pytest.raises(AssertionError):
        AppliedSet.load(meta, arrays)
