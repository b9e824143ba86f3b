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
EARLY_CHECKS = frozenset({10, 100})
"""Steps by a recording that are compared besides."""
LONG_STEP_S = 1.0
"""Seconds of a processor from which a step is not recorded: Python's part of it is below 1%."""

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
        self._known: set[Shape] = set()
        self._runs: Counter[Shape] = Counter()
        self._unseen: Counter[Shape] = Counter()
        """Of these, since the last comparison."""
        self._compared: Counter[Shape] = Counter()
        """The step that was compared last."""

    def due(self, shape: Shape) -> bool:
        """Count one more step of this shape; whether it is now time to record it."""
        if not self._recorded or shape in self.recordings:
            return False
        self._seen[shape] += 1
        return self._seen[shape] > self._record_after

    def knows(self, shape: Shape) -> bool:
        """Whether it is known how long a step of this shape takes."""
        return shape in self._known

    def took(self, shape: Shape, seconds: float) -> None:
        """The first step of this shape has taken so long; if that is long, none is recorded."""
        self._known.add(shape)
        if self._recorded and seconds >= LONG_STEP_S:
            self.recordings.setdefault(shape, None)

    def postpone(self, shape: Shape) -> None:
        """Have the next step of this shape recorded, since this one could not be."""
        self.recordings.pop(shape, None)

    def check_due(self, shape: Shape) -> bool:
        """Count one more step by this shape's recording; whether it is now time to compare.

        The first is compared, on another mini-batch than the one recorded, `EARLY_CHECKS`, and one
        of every `CHECK_EVERY`.
        """
        if self.recordings.get(shape) is None:
            return False
        self._runs[shape] += 1
        run = self._runs[shape]
        due = run % CHECK_EVERY == 1 or run in EARLY_CHECKS
        self._unseen[shape] = run - self._compared[shape] - due
        if due:
            self._compared[shape] = run
        return due

    def runs(self, shape: Shape) -> int:
        """Steps by this shape's recording since the comparison before."""
        return self._unseen[shape]
