"""The witness: once each is what the applied set says; twice, or another instead, is not."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from downpour.paramserver.partition.applied_set import APPLIED, AppliedSet
from downpour.paramserver.partition.witness import Witness, expected

names = st.sets(st.tuples(st.integers(0, 5), st.integers(0, 30)), min_size=2, max_size=60)


def seen(*pushed: tuple[int, int]) -> Witness:
    witness = Witness()
    for epoch, batch in pushed:
        witness.add(epoch, (batch,))
    return witness


def flags(pushed: set[tuple[int, int]]) -> dict[int, np.ndarray]:
    applied = AppliedSet(31)
    for epoch, batch in pushed:
        applied.add(epoch, batch, APPLIED)
    return {epoch: applied.flags(epoch) for epoch in range(6)}


@given(names, st.randoms())
def test_once_each_in_any_order_is_what_the_flags_say(pushed: set, random: object) -> None:
    order = list(pushed)
    random.shuffle(order)  # type: ignore[attr-defined]
    assert seen(*order).dump() == expected(flags(pushed))


@given(names)
def test_twice_or_instead_of_another_is_not(pushed: set) -> None:
    one, other, *rest = sorted(pushed)
    assert seen(one, one, other, *rest).dump() != expected(flags(pushed))
    assert seen(one, one, *rest).dump() != expected(flags(pushed))
    assert seen(one, *rest).dump() != expected(flags(pushed))


def test_a_push_of_several_is_the_same_as_one_by_one() -> None:
    witness = Witness()
    witness.add(3, (1, 4, 7))
    assert witness.dump() == seen((3, 7), (3, 1), (3, 4)).dump()
