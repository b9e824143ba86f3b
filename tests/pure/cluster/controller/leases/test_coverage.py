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


def flags(*epochs: list[int]) -> Flags:
    return {e: np.array(states, np.uint8) for e, states in enumerate(epochs)}


def report(applied: int, refused: int = 0) -> Any:
    return SimpleNamespace(batches_applied=applied, refused=refused)


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
