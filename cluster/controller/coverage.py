"""What the partitions' applied sets say, taken together. Pure.

A mini-batch is done where every partition has settled it; an epoch has been trained exactly once
where every partition has settled all of it, and has as many versions as that needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from downpour.paramserver.partition.applied_set import REFUSED, WAITING

if TYPE_CHECKING:
    from downpour.paramserver.actor import PartitionReport

Flags = Mapping[int, npt.NDArray[np.uint8]]
"""By epoch, the state of every mini-batch on one partition."""


def settled_by_all(answers: Sequence[Flags], epoch: int) -> npt.NDArray[np.bool_]:
    """Mini-batches of `epoch` that every partition has settled, bool [q]."""
    settled: npt.NDArray[np.bool_] = np.logical_and.reduce([f[epoch] != WAITING for f in answers])
    return settled


def settled_by_some(answers: Sequence[Flags], epoch: int) -> npt.NDArray[np.bool_]:
    """Mini-batches of `epoch` that some partition has settled and another has not, bool [q]."""
    by_any: npt.NDArray[np.bool_] = np.logical_or.reduce([f[epoch] != WAITING for f in answers])
    return by_any & ~settled_by_all(answers, epoch)


def settled_once(
    answers: Sequence[Flags], reports: Sequence[PartitionReport], *, whole: bool = True
) -> bool:
    """Whether all partitions settled the same mini-batches, and counted each of them once.

    With `whole`, these have to be all mini-batches of all epochs. A run that ended early is judged
    by what it trained, which is less.
    """
    for flags, report in zip(answers, reports, strict=True):
        waiting = sum(int((state == WAITING).sum()) for state in flags.values())
        if whole and waiting:
            return False
        total = sum(len(state) for state in flags.values()) - waiting
        if report.batches_applied + report.refused != total:
            return False
    return not any(settled_by_some(answers, epoch).any() for epoch in answers[0])


def same(answers: Sequence[Flags], others: Sequence[Flags]) -> bool:
    """Whether every partition has settled just what it had."""
    return all(
        np.array_equal(flags[epoch], before[epoch])
        for flags, before in zip(answers, others, strict=True)
        for epoch in flags
    )


def unfinished_epochs(answers: Sequence[Flags]) -> dict[int, int]:
    """By epoch that was begun and not completed, how many of its mini-batches are settled."""
    settled = {epoch: settled_by_all(answers, epoch) for epoch in answers[0]}
    return {e: int(done.sum()) for e, done in settled.items() if done.any() and not done.all()}


def refused_by_any(answers: Sequence[Flags], epoch: int) -> set[tuple[int, int]]:
    """Mini-batches of `epoch`, as (epoch, index), that some partition refused."""
    refused = np.logical_or.reduce([f[epoch] == REFUSED for f in answers])
    return {(epoch, int(b)) for b in np.flatnonzero(refused)}
