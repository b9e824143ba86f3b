"""A witness of what went into the weights, apart from the applied set and able to contradict it.

The applied set has a flag for each mini-batch. A flag that is set twice looks like one that is set
once, so flags cannot show that a mini-batch was applied twice. The witness is kept where gradients
meet the weights: how many mini-batches did, and a sum of hashes of their names. A mini-batch that
is applied twice, or instead of another, changes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from downpour.paramserver.partition.applied_set import APPLIED

_MASK = (1 << 64) - 1
_FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
"""Odd multipliers of SplitMix64 (Steele, Lea and Flood 2014)."""


class Witness:
    """Counts mini-batches, and adds up 64-bit hashes of their names."""

    __slots__ = ("count", "total")

    def __init__(self, count: int = 0, total: int = 0) -> None:
        """Nothing has been seen; or as `dump` says."""
        self.count = count
        self.total = total

    def add(self, epoch: int, batches: Sequence[int]) -> None:
        """Mini-batches go into the weights."""
        total = self.total
        for batch in batches:
            mixed = ((epoch << 32 | batch) * _FIRST) & _MASK
            total += ((mixed ^ mixed >> 32) * _SECOND) & _MASK
        self.total = total & _MASK
        self.count += len(batches)

    def dump(self) -> tuple[int, int]:
        """Return the count and the sum."""
        return self.count, self.total


def expected(flags: Mapping[int, npt.NDArray[np.uint8]]) -> tuple[int, int]:
    """Return what a witness says if every applied mini-batch was applied once.

    Args:
        flags: by epoch, the state of every mini-batch, uint8 [q].
    """
    count = total = 0
    for epoch, states in flags.items():
        applied: npt.NDArray[Any] = np.flatnonzero(states == APPLIED).astype(np.uint64)
        mixed = (applied | np.uint64(epoch << 32)) * np.uint64(_FIRST)
        hashes = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(_SECOND)
        count += len(applied)
        total += int(hashes.sum(dtype=np.uint64))
    return count, total & _MASK
