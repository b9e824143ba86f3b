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


def settled_once(answers: Sequence[Flags], reports: Sequence[PartitionReport]) -> bool:
    """Whether every partition settled every mini-batch of every epoch, and applied all that
    none refused as often as it has versions.
    """
    for flags, report in zip(answers, reports, strict=True):
        if any((state == WAITING).any() for state in flags.values()):
            return False
        total = sum(len(state) for state in flags.values())
        if report.batches_applied + report.refused != total:
            return False
    return True


def refused_by_any(answers: Sequence[Flags], epoch: int) -> set[tuple[int, int]]:
    """Mini-batches of `epoch`, as (epoch, index), that some partition refused."""
    refused = np.logical_or.reduce([f[epoch] == REFUSED for f in answers])
    return {(epoch, int(b)) for b in np.flatnonzero(refused)}
