"""What applied sets say together, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from downpour.cluster.controller.leases.coverage import (
    Flags,
    covered_by_some,
    covered_once,
    unfinished_epochs,
)
from downpour.paramserver.partition.applied_set import APPLIED, REFUSED, WAITING
from downpour.paramserver.partition.witness import Witness, expected
from downpour.shuffler.plan.plan import Plan


def flags(*epochs: list[int]) -> Flags:
    return {e: np.array(states, np.uint8) for e, states in enumerate(epochs)}


def report(applied: int, refused: int = 0) -> Any:
    return SimpleNamespace(batches_applied=applied, refused=refused, witness=None, examples=0)


def test_all_of_the_run_covered_once() -> None:
    one = flags([APPLIED, APPLIED], [APPLIED, REFUSED])
    assert covered_once([one, one], [report(3, 1), report(3, 1)])
    assert not covered_once([one, one], [report(3, 1), report(4, 1)])  # one was applied twice
    lacking = flags([APPLIED, APPLIED], [APPLIED, WAITING])
    assert not covered_once([one, lacking], [report(3, 1), report(3, 0)])


def test_what_ended_early_is_judged_by_what_all_partitions_cover() -> None:
    one = flags([APPLIED, APPLIED, APPLIED], [WAITING, APPLIED, WAITING], [WAITING] * 3)
    assert not covered_once([one, one], [report(4), report(4)])
    assert covered_once([one, one], [report(4), report(4)], whole=False)
    assert not covered_once([one, one], [report(4), report(5)], whole=False)
    other = flags([APPLIED, APPLIED, APPLIED], [APPLIED, WAITING, WAITING], [WAITING] * 3)
    assert not covered_once([one, other], [report(4), report(4)], whole=False)
    assert covered_by_some([one, other], 1).tolist() == [True, True, False]
    assert unfinished_epochs([one, one]) == {1: 1}


def test_what_was_applied_twice_shows_in_the_witness_and_in_the_examples() -> None:
    """By flags and counts alone each of these runs looks right."""
    plan = Plan(num_rows=11, batch_size=4, seed=0, window_batches=2)
    one = flags([APPLIED] * 3, [APPLIED] * 3)
    told = SimpleNamespace(batches_applied=6, refused=0, examples=22, witness=expected(one))
    assert covered_once([one], [told], plan=plan)  # type: ignore[list-item]
    twice = Witness(*expected(one))
    twice.add(0, (1,))
    for wrong in (
        {"witness": twice.dump()},
        {"witness": (6, expected(one)[1] ^ 1)},
        {"examples": 26},
        {"examples": 18},
    ):
        other = SimpleNamespace(**{**vars(told), **wrong})
        assert not covered_once([one, one], [told, other], plan=plan)  # type: ignore[list-item]
    skipped = SimpleNamespace(**{**vars(told), "examples": 18})
    assert covered_once([one], [skipped], plan=plan, skips=True)  # type: ignore[list-item]
