"""When a step is recorded, and when its recording is compared with the step again. Pure.

Recordings are kept by the shapes of mini-batches. What a recording is, is the caller's business: a
list of kernels (`recording`), or a graph on a device (`captured`).
"""

from __future__ import annotations

from collections import Counter
from typing import Generic, TypeVar

RECORD_AFTER = 1
"""Steps of a process on mini-batches of one shape after which the step is recorded."""
CHECK_EVERY = 1000
"""Steps of a process by one recording, of which one is compared with the step itself."""

Shape = tuple[object, ...]
"""Shapes and dtypes of a step's mini-batches, and how many there are."""
RecordingT = TypeVar("RecordingT")


class RecordBook(Generic[RecordingT]):
    """The recordings of a process, by shape, and how many steps each has run."""

    def __init__(self, *, recorded: bool = True, record_after: int = RECORD_AFTER) -> None:
        """Nothing is recorded yet, nor ever without `recorded`."""
        self.recordings: dict[Shape, RecordingT | None] = {}
        """By the shapes of a step; None where there is no recording to be had."""
        self._recorded = recorded
        self._record_after = record_after
        self._seen: Counter[Shape] = Counter()
        self._runs: Counter[Shape] = Counter()

    def due(self, shape: Shape) -> bool:
        """Count one more step of this shape; whether it is now time to record it."""
        if not self._recorded or shape in self.recordings:
            return False
        self._seen[shape] += 1
        return self._seen[shape] > self._record_after

    def postpone(self, shape: Shape) -> None:
        """Have the next step of this shape recorded, since this one could not be."""
        self.recordings.pop(shape, None)

    def check_due(self, shape: Shape) -> bool:
        """Count one more step by this shape's recording; whether it is now time to compare.

        The first is compared, on another mini-batch than the one recorded, then one of every
        `CHECK_EVERY`.
        """
        if self.recordings.get(shape) is None:
            return False
        self._runs[shape] += 1
        return self._runs[shape] % CHECK_EVERY == 1

    def runs(self, shape: Shape) -> int:
        """Steps by this shape's recording since it was last compared."""
        return min(self._runs[shape] - 1, CHECK_EVERY - 1)
