"""The Ray actor of the shuffler. Plain Python: `cluster.launch` wraps it with `ray.remote`."""

from __future__ import annotations

import os
import time

import numpy as np
from numpy.typing import NDArray

from shuffler.delivery import Part, Reading
from shuffler.plan import Plan
from shuffler.reader import DEFAULT_CACHE_BYTES, RowReader
from shuffler.records import Dataset


class ShufflerActor:
    """Reads the rows of windows from the shards that are its own, and hands them over."""

    def __init__(
        self,
        index: int,
        data_uri: str,
        split: str,
        plan: Plan,
        num_classes: int,
        num_shufflers: int = 1,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        prefetch_windows: int = 2,
    ) -> None:
        """Open the split.

        Args:
            index: of this shuffler, in [0, num_shufflers).
            data_uri: the dataset.
            split: to be read.
            plan: which rows a window holds.
            num_classes: labels must lie in [0, num_classes).
            num_shufflers: among which the rows are divided, by shards.
            cache_bytes: bound of the row groups that are kept in memory.
            prefetch_windows: that are read ahead into the cache, in the plan's order.
        """
        self._index = index
        self._plan = plan
        dataset = Dataset.open(data_uri, split)
        self._start, self._stop = dataset.share(index, num_shufflers)
        self._reader = RowReader(dataset, num_classes=num_classes, cache_bytes=cache_bytes)
        self._prefetch_windows = prefetch_windows

    def __repr__(self) -> str:
        """What Ray's dashboard and log prefixes show."""
        return f"Shuffler({self._index})"

    def ready(self) -> int:
        """Answers, with the process id, once the actor is up."""
        return os.getpid()

    def deliver(self, epoch: int, batches: tuple[int, ...]) -> Part:
        """Those rows of these mini-batches of an epoch that are in this shuffler's shards."""
        began_s = time.monotonic()
        rows, lengths = self._plan.rows_of(epoch, batches)
        positions = self._mine(rows)
        batch = self._reader.take(rows[positions])
        self._prefetch(epoch, batches[0] // self._plan.window_batches)
        reading = Reading(
            shuffler=self._index,
            rows=len(positions),
            seconds=time.monotonic() - began_s,
            hits=self._reader.hits,
            misses=self._reader.misses,
        )
        return Part(batch=batch, positions=positions, lengths=lengths, rows=rows, reading=reading)

    def _mine(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.flatnonzero((rows >= self._start) & (rows < self._stop))

    def _prefetch(self, epoch: int, window: int) -> None:
        """Begin to read the windows that come after one; most of the time one of them is new."""
        plan = self._plan
        for next_epoch, following in plan.next_windows(epoch, window, self._prefetch_windows):
            rows, _ = plan.rows_of(next_epoch, plan.window_batches_order(next_epoch, following))
            self._reader.prefetch(rows[self._mine(rows)])
